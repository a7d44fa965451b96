"""`rabbit plan MODEL`: the plan, before anything is downloaded or split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from rabbit_engine.cli import engine, options, output
from rabbit_engine.cli.groups import Only, takes_groups
from rabbit_engine.cli.loading import Loading
from rabbit_engine.cli.wording import as_options
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.utils.report import as_table
from rabbit_engine.utils.sizes import parse_rate
from rabbit_engine.utils.speeds import Speeds

if TYPE_CHECKING:
    from rabbit_engine.model.settings import LoadSettings
    from rabbit_engine.planning.machines import Machine
    from rabbit_engine.planning.plan import Plan
    from rabbit_engine.planning.stages import StagesPlan

_OPTIONS = Only(
    *(
        "max_memory",
        "device_map",
        "device",
        "dtype",
        "split",
        "compression",
        "saving_path",
        "onto",
        "gguf_file",
        "revision",
        "token",
        "trust_remote_code",
        "speculate",
        "draft",
        "draft_compression",
    ),
)


@takes_groups
def plan(
    model: options.Model,
    max_seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens whose cache must fit in that memory too.")] = None,
    disk_rate: Annotated[
        str | None,
        typer.Option(callback=options.check_rate, help="Bytes per second of the disk, such as 5GB/s; measured by default."),
    ] = None,
    link_rate: Annotated[
        str | None, typer.Option(callback=options.check_rate, help="Bytes per second to the device, such as 13GB/s.")
    ] = None,
    machines: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plan for these machines together: a JSON list, described in docs/scale.md."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Measure the machines of a Ray cluster and plan for them; --max-memory is of each."),
    ] = None,
    texts: Annotated[
        int | None, typer.Option(min=1, help="With --machines or --cluster: the texts in a pass that the plan is made for.")
    ] = None,
    *,
    loading: Annotated[Loading, _OPTIONS],
) -> None:
    """Print what would stay in memory, what would be streamed, and the cost of a pass; reads headers only.

    With --max-memory the device need not be present: --device cuda:0 --max-memory 0=8GiB,cpu=24GiB, or, for the layers divided
    among two, --device cuda --max-memory 0=8GiB,1=6GiB,cpu=24GiB.
    """
    if machines is not None or cluster is not None:
        _refuse_beside_machines(loading, machines, cluster, disk_rate=disk_rate, link_rate=link_rate)
        if cluster is not None:
            found = _forecast_on(cluster, model, loading, texts or 1, max_seq_len)
        else:
            found = _forecast_over(_listed(machines), model, loading, texts or 1, max_seq_len)
        names = ", ".join(machine.name for machine in found.machines)
        Console(highlight=False).print(as_table(found.rows(), f"{model} on {names}"))
        return
    if texts is not None:
        raise ConfigurationError("--texts is for plans over several machines: give --machines or --cluster too")
    output.note(f"reading the headers of {model} ...")
    settings = engine.model.read_settings({**loading.keywords(), "max_seq_len": max_seq_len}, planned=True)
    rates = {link: float(parse_rate(rate)) for link, rate in (("disk", disk_rate), ("link", link_rate)) if rate is not None}
    speeds = Speeds(**rates, source="given") if rates else None
    settings = replace(settings, stream=replace(settings.stream, speeds=speeds))
    places = settings.stream.device if settings.row is None else ", ".join(one.name for one in settings.row.devices)
    rows = [(name, as_options(value)) for name, value in _forecast(model, settings, loading).rows()]
    Console(highlight=False).print(as_table(rows, f"{model} on {places}"))


def _refuse_beside_machines(loading: Loading, machines: Path | None, cluster: str | None, **rates: str | None) -> None:
    if machines is not None and cluster is not None:
        raise ConfigurationError("--machines and --cluster name machines: give one of them")
    given = {
        "device": loading.device,
        "device_map": loading.device_map,
        **rates,
        "draft": loading.draft,
        "speculate": loading.speculate or None,
    }
    if cluster is None:
        given["max_memory"] = loading.max_memory
    if refused := [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]:
        source = "--machines says" if cluster is None else "--cluster measures"
        raise ConfigurationError(f"{', '.join(refused)} is for one machine: leave it out, {source} what each has")


def _listed(file: Path | None) -> Sequence[Machine]:
    return engine.machines.read_machines(file) if file is not None else ()


def _forecast_on(address: str, model: str, loading: Loading, texts: int, max_seq_len: int | None) -> StagesPlan:
    """The plan over the machines of a cluster, each with all its free memory or with --max-memory."""
    if loading.max_memory is not None and "=" in loading.max_memory:
        raise ConfigurationError(f"--max-memory {loading.max_memory} with --cluster: give one size, for each machine")
    output.note(f"measuring the machines of the cluster at {address}, reading the headers of {model} ...")
    settings = engine.model.read_settings({**loading.keywords(), "device": "cpu", "max_seq_len": max_seq_len})
    found: StagesPlan = engine.model_cluster.forecast_on_cluster(model, settings, address, texts)
    return found


def _forecast_over(machines: Sequence[Machine], model: str, loading: Loading, texts: int, max_seq_len: int | None) -> StagesPlan:
    output.note(f"reading the headers of {model} ...")
    settings = engine.model.read_settings({**loading.keywords_of_headers(), "max_seq_len": max_seq_len}, planned=True)
    return engine.forecast.forecast_stages(model, settings.source, settings.split, settings.stream, machines, texts=texts)


def _forecast(model: str, settings: LoadSettings, loading: Loading) -> Plan:
    if (guesses := loading.guesses) is not None:
        return engine.model.forecast_with_draft(model, settings, guesses)
    if settings.row is not None:
        return engine.model.forecast_row(model, settings, settings.row)
    return engine.forecast.forecast(model, settings.source, settings.split, settings.stream)
