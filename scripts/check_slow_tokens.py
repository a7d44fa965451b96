"""Asks a server whose passes take long, through OpenAI's client with short time-outs: streamed, whole, and from the queue.

    python scripts/check_slow_tokens.py [--pass-s 15] [--timeout 12]

The model is tiny; every pass waits. A time-out of the client that is shorter than a pass shows that the server's signs of life
reach it: comments in streams, newlines before whole answers. Prints a line for each way of asking.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> None:
    """Start the server, ask it, and print the seconds."""
    import openai
    import talking  # type: ignore[import-not-found,unused-ignore] # from the tests
    from serving import NAME, serving  # type: ignore[import-not-found,unused-ignore]

    from rabbit_engine import AutoModel, Session

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pass-s", type=float, default=15.0, help="seconds of a pass")
    parser.add_argument("--timeout", type=float, default=12.0, help="the client's time-out, for any silence")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        AutoModel.from_pretrained(talking.save(Path(folder)), device="cpu") as model,
        Session(model, max_requests=2, max_new_tokens=3) as session,
        serving(session) as url,
        ThreadPoolExecutor() as pool,
    ):
        expected = session.generate(["abc"], max_new_tokens=3, ignore_eos=True)[0].text
        model.get_input_embeddings().register_forward_pre_hook(
            lambda *_: time.sleep(given.pass_s / 2)
        )  # two answers share a pass
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=given.timeout, max_retries=0)

        def ask(how: str) -> str:
            began, body = time.monotonic(), {"ignore_eos": True}
            if how == "streamed":
                chunks = client.completions.create(model=NAME, prompt="abc", max_tokens=3, stream=True, extra_body=body)
                text = "".join(chunk.choices[0].text for chunk in chunks)
            else:
                text = client.completions.create(model=NAME, prompt="abc", max_tokens=3, extra_body=body).choices[0].text
            assert text == expected, (text, expected)
            return f"{how}: the right answer after {time.monotonic() - began:.1f} s"

        asked = [pool.submit(ask, how) for how in ("streamed", "whole", "streamed", "whole")]  # the last two wait in the queue
        for each in asked:
            print(each.result(), flush=True)


if __name__ == "__main__":
    main()
