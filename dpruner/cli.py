"""The command line: prune, resume, cancel, runs, evaluate, similarity, generate, export, experiment.

The exit code is 0, 1 (failed: one line says why and what to do) or 2 (bad arguments).
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import shlex
import sys
import typing
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from dpruner import signals
from dpruner.bars import counting, watching
from dpruner.config import KINDS, REPEATED, RunConfig
from dpruner.designs import DESIGNS
from dpruner.errors import InputError, shortened

AGAIN = "what it has finished is kept; the same command goes on from there"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        with signals.heard():
            args.command(args)
        return 0
    except InputError as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt as stopped:   # by ctrl-C or what is taken as such, or in the browser
        print(stopped.__cause__ or f"Stopped: {str(stopped) or 'nothing half-written is left; start it again when you like'}.", file=sys.stderr)
    except BrokenPipeError:
        sys.stderr.close()   # the reader of a pipe went away: nobody is left to tell
    except Exception as error:
        if args.traceback:
            raise
        from dpruner.status import explained
        print(explained(error, "The command", lambda: "free some memory and start it again; what it has finished is kept") or
              f"It failed unexpectedly: {type(error).__name__}: {error}; run it again with --traceback and report what it prints.", file=sys.stderr)
    return 1


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one sentence: the usage of `prune` alone is longer than a screen."""

    def __init__(self, **how):
        super().__init__(**how)
        for kind in (int, float):
            self.register("type", kind, functools.partial(_number, kind))

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:   # said here, by the command that does not know them
            self.error(f"not known: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str):
        message = message.replace("expected one argument", "it takes a value, and none that begins like an option")
        self.exit(2, f"The command cannot be followed: {shortened(message)}; see {self.prog} --help.\n")


def _number(kind: type, word: str):
    """A number of an option."""
    try:
        return kind(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"it takes {KINDS[kind]}, not {word!r}") from None


def parser() -> Parser:
    """All commands and their options."""
    top = Parser(prog="python -m dpruner", description="Domain-specific pruning of language models.")
    commands = top.add_subparsers(required=True, metavar="command")
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("--runs", default="runs", metavar="FOLDER", help="folder of the run folders (default: runs)")
    common.add_argument("--traceback", action="store_true", help="show where an unexpected failure came from")

    chosen = Parser(add_help=False)
    chosen.add_argument("run", help="id of a run, the start of it, a folder, or 'last'")
    chosen.add_argument("--method", action="append", metavar="NAME", help="method of the run (default: all)")
    chosen.add_argument("--domain", action="append", metavar="NAME", help="domain of the run (default: all)")

    prune = commands.add_parser("prune", parents=[common],
                                help="prune a model for one or more domains, evaluate, keep everything in a run folder")
    prune.add_argument("--config", metavar="FILE", help="a run.json or its settings, to repeat a run; other options override it")
    prune.add_argument("--cache", default="cache", metavar="FOLDER", help="folder of what runs share (default: cache)")
    prune.add_argument("--dry-run", action="store_true",
                       help="only tell what the run would take: time, memory, disk, and what is wrong with it")
    for field in dataclasses.fields(RunConfig):
        _add_setting(prune, field)
    prune.set_defaults(command=command_prune)

    resume = commands.add_parser("resume", parents=[common], help="let a run that failed or was stopped go on from what it has")
    resume.add_argument("run", help="id of a run, the start of it, a folder, or 'last'")
    resume.add_argument("--cache", default="cache", metavar="FOLDER", help="folder of what runs share (default: cache)")
    resume.add_argument("--memory", metavar="VALUE", help="most to use on the device from now on; changes no result (default: as before)")
    resume.set_defaults(command=command_resume)

    cancel = commands.add_parser("cancel", parents=[common], help="end a run or an experiment that waits or runs; it can go on later")
    cancel.add_argument("run", help="id of a run, the start of it, a folder of a run or an experiment, or 'last'")
    cancel.set_defaults(command=command_cancel)

    runs = commands.add_parser("runs", parents=[common], help="list the runs, or show one")
    runs.add_argument("run", nargs="?", help="id of a run, the start of it, a folder, or 'last'")
    runs.set_defaults(command=command_runs)

    evaluate = commands.add_parser("evaluate", parents=[common, chosen],
                                   help="give tasks to the pruned models of a run and to the dense one beside them")
    evaluate.add_argument("--task", action="append", metavar="NAME_OR_FILE",
                          help="a built-in domain or task, a hub data set, or a file, also as name=path (default: what belongs to each "
                          "domain)")
    evaluate.add_argument("--against", default="dense", metavar="METHOD",
                          help="method of the run that each is compared with (default: dense)")
    evaluate.add_argument("--limit", type=int, default=500, metavar="ITEMS",
                          help="at most this many items of each task, drawn by the seed (default: 500)")
    evaluate.add_argument("--seed", type=int, default=0, metavar="VALUE", help="of the items drawn and of the intervals (default: 0)")
    evaluate.add_argument("--device", metavar="VALUE", help="default: that of the run")
    evaluate.set_defaults(command=command_evaluate)

    similarity = commands.add_parser("similarity", parents=[common, chosen], help="how alike the masks of a run's domains are")
    similarity.add_argument("--matrices", action="store_true", help="for each matrix by itself")
    similarity.set_defaults(command=command_similarity)

    generate = commands.add_parser("generate", parents=[common, chosen],
                                   help="continue a prompt with the pruned models of a run and the dense one")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the beginning of a text")
    generate.add_argument("--max-new-tokens", type=int, default=48, metavar="VALUE", help="(default: 48)")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="VALUE", help="0 takes the most probable token (default: 0)")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="VALUE",
                          help="draw from the most probable tokens that have this share (default: 1)")
    generate.add_argument("--seed", type=int, default=0, metavar="VALUE", help="of the drawing (default: 0)")
    generate.add_argument("--device", metavar="VALUE", help="default: that of the run")
    generate.set_defaults(command=command_generate)

    export = commands.add_parser("export", parents=[common], help="write a pruned checkpoint that AutoModelForCausalLM loads")
    export.add_argument("run", help="id of a run, the start of it, a folder, or 'last'")
    export.add_argument("--method", required=True, help="whose mask")
    export.add_argument("--domain", required=True, help="for which domain")
    export.add_argument("--to", required=True, metavar="FOLDER", help="folder to make")
    export.set_defaults(command=command_export)

    experiment = commands.add_parser("experiment", parents=[common], help="ask one question of several runs, or write down what was found")
    experiment.add_argument("name", choices=[*DESIGNS, "report"], help="which question; 'report' writes all stored answers to a file")
    experiment.add_argument("--value", action="append", metavar="VALUE",
                            help="on the axis of the experiment, once for each (default: the usual ones)")
    experiment.add_argument("--task", action="append", metavar="NAME_OR_FILE",
                            help="what every mask is judged on, as `evaluate` takes it (default: perplexity on held-out text of its domain "
                            "and of the open domain)")
    experiment.add_argument("--limit", type=int, default=100, metavar="ITEMS", help="at most this many items of each task (default: 100)")
    experiment.add_argument("--experiments", default="experiments", metavar="FOLDER",
                            help="folder of the experiments (default: experiments)")
    experiment.add_argument("--cache", default="cache", metavar="FOLDER", help="folder of what runs share (default: cache)")
    experiment.add_argument("--to", default="docs/RESULTS.md", metavar="FILE", help="where 'report' writes (default: docs/RESULTS.md)")
    for field in dataclasses.fields(RunConfig):
        _add_setting(experiment, field)
    experiment.set_defaults(command=command_experiment)
    return top


def _add_setting(prune: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    """One option for one setting of a run; options that are not given leave the config file's value, then the default."""
    explained = field.metadata["help"].replace("%", "%%")
    options = {"dest": field.name, "default": None, "help": f"{explained} (default: {_shown(field.default)})"}
    if field.name in REPEATED:
        prune.add_argument(f"--{REPEATED[field.name]}", action="append", metavar="NAME", **options)
        return
    flag = f"--{field.name.replace('_', '-')}"
    kinds = typing.get_args(field.type) or (field.type,)
    if bool in kinds:
        prune.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    else:
        prune.add_argument(flag, type=next(k for k in kinds if k is not type(None)), metavar="VALUE", **options)


def _shown(default) -> str:
    return ", ".join(default) if isinstance(default, tuple) else "automatic" if default is None else str(default)


def command_prune(args: argparse.Namespace) -> None:
    """`prune`: settings to run folder, then its table."""
    earlier = _config_file(args.config) if args.config else {}
    config = settings(args, earlier)
    config.check()
    if args.dry_run:
        return _together(config, lambda: _show_estimate(config, args))
    run = _finished(config, args, runs=Path(args.runs))
    if run is not None:
        _warn_if_changed(args.config, earlier, run)
        _show(run, args)


def _show_estimate(config: RunConfig, args: argparse.Namespace) -> None:
    """What a run would take."""
    from dpruner import estimate, tables
    told = estimate.told(config, Path(args.runs), Path(args.cache))
    print(json.dumps(told, ensure_ascii=False)) if args.json else tables.show_estimate(told, Console(highlight=False))


def _finished(config: RunConfig, args: argparse.Namespace, begun: Callable[[], RunConfig] | None = None, **where: Path):
    """The run, done from beginning to end; None in a process that only helps another one.

    Args:
        begun: called in the first process alone, for the settings that are to hold instead.
    """
    from dpruner import distributed, estimate, pipeline, turns

    def work():
        if config.finetune and distributed.several():
            print("Fine-tuning takes one batch after the other: its domain pass runs in the first process, and the others wait.",
                  file=sys.stderr)
        now = begun() if begun else config
        if not distributed.several():
            for caution in estimate.cautions_of(now, where.get("runs")):
                print(caution, file=sys.stderr)
        with _stopped(lambda: _way_on(turns.identity(), **where)), watching() as watch:
            return pipeline.run(now, cache=args.cache, watch=watch, **where)

    return _together(config, work, **where)


def _together(config: RunConfig, work: Callable, **where):
    """What `work()` gives, in the first of the processes that torchrun has started; None in those that help it."""
    from dpruner import distributed, loading
    with loading.quiet_libraries(), distributed.team() as first:
        if first:
            return work()
        try:
            distributed.follow(lambda: loading.load_model(config.model, revision=config.revision, device=config.device,
                                                          dtype=config.dtype)[0])
        except distributed.Lost as lost:
            print(_last_words(lost.first, **where), file=sys.stderr)


def _run_of(who: dict, runs: str | Path | None = None, folder: Path | None = None):
    """The run of a process; None where it has no folder yet.

    Args:
        who: as `turns.identity` gives it.
        runs, folder: as `pipeline.run` takes them.
    """
    from dpruner import store
    return store.Run(folder) if folder else next((run for run in store.find_runs(runs) if who.items() <= _status(run).items()), None)


def _way_on(who: dict, **where) -> str:
    """What becomes of a run that was stopped."""
    run = _run_of(who, **where)
    return f"what it has finished is kept; `python -m dpruner resume {shlex.quote(str(run.folder))}` goes on from there" if run else ""


def _last_words(who: dict, **where) -> str:
    """What is said of a run whose process has died."""
    run = _run_of(who, **where) if where else None
    return _told(_status(run)) if run else "The run died before it began: its first process has ended, killed or out of memory; start it again."


@contextlib.contextmanager
def _stopped(told: Callable[[], str]):
    """While open, what is stopped says how it goes on."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(told()) from stopped.__cause__


def _show(run, args: argparse.Namespace) -> None:
    """The table of a finished run."""
    from dpruner import report, tables
    result = report.summary(run)
    print(json.dumps(result, ensure_ascii=False)) if args.json else tables.show_run(result, Console(highlight=False))


def command_resume(args: argparse.Namespace) -> None:
    """`resume`: the rest of a run, then its table."""
    from dpruner import store, worker
    run = store.open_run(args.run, args.runs)
    if _finished(RunConfig.from_dict(run.config), args, lambda: worker.to_go_on(run, args.memory), folder=run.folder) is not None:
        _show(run, args)


def command_cancel(args: argparse.Namespace) -> None:
    """`cancel`: what waits or runs ends, and keeps what it has."""
    from dpruner import store, worker
    run = store.Run(args.run) if worker.is_experiment(Path(args.run)) else store.open_run(args.run, args.runs)
    state = worker.state(run)["state"]
    if state not in worker.GOING:
        raise InputError(f"{run.id} cannot be cancelled", f"it is {state}", "choose one that waits or runs")
    worker.cancel(run)
    state = worker.state(run)["state"]
    print(json.dumps({"id": run.id, "folder": str(run.folder), "state": state}) if args.json else f"{run.id}: {state}")


def settings(args: argparse.Namespace, earlier: dict) -> RunConfig:
    """The settings of an earlier run, then the options.

    Raises:
        InputError: the earlier run has settings that are not known.
    """
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(RunConfig) if getattr(args, f.name) is not None}
    return RunConfig.from_dict({**earlier.get("config", {}), **given})


def _config_file(path: str) -> dict:
    """A run.json as it is, or a plain object of settings as {"config": settings}."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror.lower() if isinstance(error, OSError) else "it is not JSON"
        raise InputError(f"The config file {path!r} cannot be read", why,
                         "give a run.json of an earlier run, or an object of settings") from error
    if not isinstance(data, dict) or not isinstance(data.get("config", {}), dict):
        raise InputError(f"The config file {path!r} cannot be used", "it holds no object of settings", "give a run.json of an earlier run")
    return data if "config" in data else {"config": data}


def _warn_if_changed(path: str, earlier: dict, run) -> None:
    """Say so when a repeated run did not see the same model or text as the run it repeats."""
    now = run.record
    model, calibration = (part if isinstance(part := earlier.get(name), dict) else {} for name in ("model", "calibration"))
    for what, then, here in [("model", model.get("fingerprint"), now["model"]["fingerprint"]),
                             *((f"calibration text of {label}", calibration.get(label), f) for label, f in now["calibration"].items())]:
        if then and then != here:
            print(f"Not the same run: the {what} differs from that of {path}, so the masks may differ too.", file=sys.stderr)


def command_runs(args: argparse.Namespace) -> None:
    """`runs`: a line each, or the table of one."""
    from dpruner import store, worker
    if args.run:
        run = store.open_run(args.run, args.runs)
        status = worker.state(run)
        if status["state"] == "done":
            return _show(run, args)
        return print(json.dumps(status, ensure_ascii=False) if args.json else f"{run.id}: {_told(status)}")
    listed = [{"id": run.id, "folder": str(run.folder), **_status(run)} for run in store.find_runs(args.runs)]
    if args.json:
        return print(json.dumps(listed, ensure_ascii=False))
    for status in listed:
        print(f"{status['id']}: {_told(status)}")
    if not listed:
        print(f"There are no runs in {args.runs!r} yet; start one with: python -m dpruner prune")


def _status(run) -> dict:
    """A run's status; a damaged one is told like a failure, so that the others are still listed."""
    from dpruner import worker
    try:
        return worker.state(run)
    except InputError as error:
        return {"state": "damaged", "error": {"what": error.what, "why": error.why, "what to do": error.fix}}


def _told(status: dict) -> str:
    """A status in words."""
    if status["error"]:
        return f"{status['state']}. {status['error']['what']}: {status['error']['why']}; {status['error']['what to do']}."
    if status["state"] == "running":
        return f"running, {status['progress']:.0%}, {status['stage']}"
    if status["state"] == "queued" and status.get("ahead"):
        return f"queued, {status['ahead']} before it on {status['device']}"
    return status["state"]


def command_evaluate(args: argparse.Namespace) -> None:
    """`evaluate`: figures of tasks, from the run folder where they are there already."""
    from dpruner import evaluations, store, tables
    from dpruner.loading import quiet_libraries
    run = store.open_run(args.run, args.runs)
    with quiet_libraries(), _stopped(lambda: AGAIN), counting() as progress:
        table = evaluations.evaluate(run, args.task, args.method, args.domain, against=args.against, limit=args.limit, seed=args.seed,
                                     device=args.device, progress=progress)
    if args.json:
        found = table.astype(object).where(table.notna(), None).to_dict("records")   # JSON knows no NaN
        return print(json.dumps({"id": run.id, "folder": str(run.folder), "figures": found}, ensure_ascii=False))
    tables.show_evaluation(table, f"Run {run.id}", Console(highlight=False))


def command_similarity(args: argparse.Namespace) -> None:
    """`similarity`: the masks of every two domains, between their floor and their ceiling."""
    from dpruner import report, store, tables
    run = store.open_run(args.run, args.runs)
    found = report.similarity(run, args.method, args.domain, args.matrices)
    print(json.dumps(found, ensure_ascii=False)) if args.json else tables.show_similarity(found, Console(highlight=False))


def command_generate(args: argparse.Namespace) -> None:
    """`generate`: the same prompt, continued by the dense model and by each pruned one."""
    from dpruner import store, variants
    from dpruner.generate import generate
    from dpruner.loading import quiet_libraries
    run = store.open_run(args.run, args.runs)
    with quiet_libraries():
        pairs = variants.chosen(run, args.method, args.domain)
        model, tokenizer = variants.load_original(run, args.device)
    found = []
    for method, domain in [(variants.DENSE, ""), *pairs]:
        with variants.variant(model, run, method, domain):
            made = list(generate(model, tokenizer, args.prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                                 top_p=args.top_p, seed=args.seed))
        found.append({"method": method, "domain": domain, "text": "".join(t.text for t in made),
                      "tokens": [dataclasses.asdict(t) for t in made]})
        if not args.json:
            print(f"{variants.label(method, domain)}: {args.prompt}{found[-1]['text']}\n", flush=True)
    if args.json:
        print(json.dumps({"id": run.id, "prompt": args.prompt, "continuations": found}, ensure_ascii=False))


def command_export(args: argparse.Namespace) -> None:
    """`export`: a checkpoint from a run."""
    from dpruner import store
    from dpruner.export import export
    from dpruner.loading import quiet_libraries
    with quiet_libraries():
        folder = export(store.open_run(args.run, args.runs), args.method, args.domain, args.to)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(json.dumps({"folder": str(folder), "bytes": size}) if args.json else
          f"Wrote {folder} ({size / 1e6:.1f} MB): load it with AutoModelForCausalLM.from_pretrained({str(folder)!r}).")


def command_experiment(args: argparse.Namespace) -> None:
    """`experiment`: its points one after the other, those that are done passed over; then its table."""
    from dpruner import experiments, findings, tables
    from dpruner.loading import quiet_libraries
    if args.name == "report":
        written = findings.write(args.experiments, args.to)
        return print(json.dumps({"file": str(args.to), "experiments": written}) if args.json else
                     f"Wrote {args.to} from {len(written)} experiments.")
    experiment = experiments.prepared(args.name, settings(args, {}), values=args.value, tasks=args.task, limit=args.limit,
                                      root=args.experiments)
    with quiet_libraries():
        ahead = experiments.foreseen(experiment.record, experiment).words
        if ahead:
            print(f"{experiment.id}: {ahead}", file=sys.stderr)
    with quiet_libraries(), _stopped(lambda: AGAIN), watching() as watch:
        table = experiments.conduct(experiment, cache=args.cache, watch=watch)
    if args.json:
        found = table.astype(object).where(table.notna(), None).to_dict("records")   # JSON knows no NaN
        return print(json.dumps({"id": experiment.id, "folder": str(experiment.folder), "figures": found}, ensure_ascii=False))
    tables.show_experiment(table, experiment.design.question, experiment.design.axis, Console(highlight=False))
