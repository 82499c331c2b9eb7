"""The command line: ckf train, evaluate, report, export, prepare, experiment, info, tune,
settings."""

import argparse
import os
import sys
from pathlib import Path

CONFIG_HELP = (
    "a YAML file, a run's config.yaml, or the name of one that ckf brings: demo, ml-1m, ..."
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a user's mistake prints one line and returns 2."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output (head, less) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor says Python so at exit
        return 141  # as a program that SIGPIPE ends
    except (ValueError, OSError) as error:
        print(f"ckf: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"ckf: {error}; pip install -e '.[recsys]' in its folder", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = getattr(options, "kept", "the same command goes on from the last checkpoint")
        print(f"ckf: interrupted; {kept}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ckf", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train and evaluate a run, or go on with one")
    train.add_argument("config", help=CONFIG_HELP)
    train.add_argument("--out", help="the run's folder (default runs/NAME)")
    train.add_argument("--prepared", help="a folder made by ckf prepare, instead of raw data")
    train.add_argument("--overwrite", action="store_true", help="remove the run first")
    train.add_argument("--no-evaluate", action="store_true", help="train only")
    _add_data(train)
    _add_device(train)
    train.set_defaults(command=_train)

    prepare = commands.add_parser("prepare", help="prepare data only, to carry to another machine")
    prepare.add_argument("config", help=CONFIG_HELP)
    prepare.add_argument("--out", required=True, help="the prepared folder")
    _add_data(prepare)
    prepare.set_defaults(command=_prepare)

    evaluate = commands.add_parser("evaluate", help="evaluate a run again from its folder alone")
    evaluate.add_argument("run")
    evaluate.add_argument("--baselines", action="store_true", help="the trivial rows only")
    _add_model(evaluate)
    _add_set(evaluate, "e.g. evaluate.batch_tokens=1024")
    _add_device(evaluate)
    evaluate.set_defaults(command=_evaluate)

    report = commands.add_parser("report", help="write the page of a run or an experiment")
    report.add_argument("run")
    report.add_argument(
        "--record", metavar="FOLDER", help="an experiment's figures as FOLDER/NAME.json too"
    )
    report.set_defaults(command=_report)

    export = commands.add_parser("export", help="one ordinary PEFT LoRA per task, for any server")
    export.add_argument("run")
    export.add_argument("--out", help="target folder (default RUN/export)")
    export.add_argument("--task", action="append", help="a task (default all); may be repeated")
    _add_model(export)
    export.set_defaults(command=_export)

    _add_experiment(commands)

    info = commands.add_parser(
        "info", help="versions, GPU, usable backends; with --model: its memory, before loading it"
    )
    _add_sizes(info)
    info.set_defaults(command=_info)

    settings = commands.add_parser("settings", help="every key of a config, with default and sense")
    settings.set_defaults(command=_settings)

    tune = commands.add_parser(
        "tune", help="measure this GPU, so that backend auto takes the fastest; minutes"
    )
    tune.add_argument("--model", help="whose linears (default: a 135M and an 8B model's)")
    tune.add_argument("--tasks", type=int, default=4, help="how many (default 4)")
    tune.add_argument("--r", type=int, default=16, help="rank of every LoRA (default 16)")
    tune.add_argument("--rows", type=int, nargs="+", help="of training steps: tokens in a batch")
    tune.set_defaults(command=_tune, kept="what was measured is kept")
    return parser


def _add_experiment(commands) -> None:
    parser = commands.add_parser(
        "experiment", help="train and compare the cells of a grid, or go on with them"
    )
    parser.add_argument("config", help=CONFIG_HELP)
    parser.add_argument("--out", help="the experiment's folder (default runs/experiment-NAME)")
    parser.add_argument("--prepared", help="a folder of ckf prepare, or of --prepare-only")
    parser.add_argument("--model", help="the language model, instead of model.name")
    parser.add_argument("--cells", default="main", help="main, full, or names with commas between")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell (default 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--reduced", action="store_true", help="cut to minutes on two CPU cores")
    parser.add_argument("--valid", action="store_true", help="evaluate on valid, not on test")
    parser.add_argument("--prepare-only", action="store_true", help="stop before the training")
    _add_data(parser)
    _add_device(parser)
    parser.set_defaults(command=_experiment)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="the raw data: a folder or file (default: data.path)")
    _add_set(parser, "e.g. train.steps=20")


def _add_set(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=example)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="the run's language model, where it lies elsewhere by now")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda or cpu (default: a GPU where there is one)")


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a Hugging Face name, a folder, or a config.json")
    parser.add_argument("--tasks", type=int, default=4, help="how many (default 4)")
    parser.add_argument("--r", type=int, default=16, help="rank (default 16)")
    parser.add_argument("--shared-r", type=int, help="rank of the shared LoRA (default: --r)")
    parser.add_argument("--gate", choices=["hard", "learned"], default="hard")
    parser.add_argument("--base", default="bf16", help="bf16 (default), fp32, int8 or nf4")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step (default 8192)")


def _train(options) -> None:
    from ckf.config_files import load_config
    from ckf.processes import is_main_process
    from ckf.run import train_run
    from ckf.run_folder import CONFIG

    config = load_config(options.config, options.set)
    file = Path(options.config)
    own = file.parent if file.name == CONFIG and (file.parent / "data").is_dir() else None
    folder = Path(options.out) if options.out else own or Path("runs") / config.name
    run = train_run(
        config, folder, options.data, options.prepared, options.device, options.overwrite
    )
    if not options.no_evaluate and is_main_process():
        _evaluate_and_report(run)


def _prepare(options) -> None:
    from ckf.config_files import load_config
    from ckf.data.prepare import prepare

    config = load_config(options.config, options.set)
    prepare(config.data, config.tasks, options.data, options.out, config.seed)
    print(f"prepared data in {options.out}")


def _evaluate(options) -> None:
    if options.baselines:
        _print_baselines(Path(options.run), options.set)
        return
    from ckf.run import load_run

    _evaluate_and_report(load_run(options.run, options.device, options.model, options.set))


def _evaluate_and_report(run) -> None:
    from rich.console import Console

    from ckf.report import metrics_table, write_report

    with _progress() as bars:
        metrics = run.evaluate(progress=bars)
    Console(width=None if sys.stdout.isatty() else 110).print(metrics_table(metrics))
    print(f"report: {write_report(run.folder)}")


def _print_baselines(folder: Path, overrides: list[str]) -> None:
    import json

    from ckf.baselines import evaluate_baselines
    from ckf.cf import CFVectors
    from ckf.data.prepared import load_prepared
    from ckf.run_folder import VECTORS, opened_config

    config = opened_config(folder, overrides)
    vectors = folder / VECTORS
    found = evaluate_baselines(
        load_prepared(folder / "data"),
        "test",
        list(config.tasks),
        CFVectors.load(vectors) if vectors.exists() else None,
        config.data.test_lists,
        config.evaluate.bootstrap,
        config.seed,
    )
    print(json.dumps(found, indent=1))


def _report(options) -> None:
    folder = Path(options.run)
    if options.record or (folder / "experiment.json").exists():
        from ckf.experiment.report import write_pages, write_record

        print(write_pages(folder))
        if options.record:
            print(write_record(folder, Path(options.record)))
        return
    from ckf.report import write_report

    print(write_report(folder))


def _experiment(options) -> None:
    from ckf.config_files import load_config
    from ckf.experiment import make_experiment, run_experiment

    overrides = options.set + ([f"model.name={options.model}"] if options.model else [])
    config = load_config(options.config, overrides)
    name = f"experiment-{config.name}{'-reduced' if options.reduced else ''}"
    out = Path(options.out) if options.out else Path("runs") / name
    split = "valid" if options.valid else "test"
    experiment = make_experiment(config, out, options.cells, options.seeds, split, options.reduced)
    run_experiment(
        experiment,
        options.data,
        options.prepared,
        options.device,
        options.prepare_only,
        jobs=options.jobs,
    )


def _export(options) -> None:
    from ckf.adapter_files import base_name
    from ckf.export import export_peft, serving_command
    from ckf.run import load_run

    run = load_run(options.run, "cpu", options.model)
    out = Path(options.out) if options.out else run.folder / "export"
    backbone, folders, rank = run.assembly.model.backbone, {}, 0
    for task in options.task or run.assembly.tasks:
        folders[task] = out / task
        rank = max(rank, export_peft(backbone, run.assembly.lora_of(task), out / task))
        print(out / task)
    layers = run.config.model.layers
    if layers is None:
        print(f"serve: {serving_command(base_name(backbone), folders, rank)}")
    else:
        print(
            f"note: trained on the first {layers} decoder layers (model.layers); under the whole "
            "model these LoRAs mean nothing, so no server has their base"
        )
    if run.assembly.uses_vectors:
        with_prior = " and without the CF model's prior" * (run.config.metanet.match == "prior")
        print(
            f"note: such a server answers without the CF vectors in the prompt{with_prior}; "
            "ckf.load_run(RUN).predict has all of it"
        )


def _info(options) -> None:
    if options.model is not None:
        _print_sizes(options)
        return
    import platform

    import torch
    import transformers

    import ckf
    from ckf.kernels import cpu, cuda, hopper
    from ckf.kernels.config import explain_auto, usable_backends

    print(f"ckf {ckf.__version__}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            print(f"GPU {index}: {torch.cuda.get_device_name(index)}")
    else:
        print("GPU: none that torch can use")
    for name, (usable, why) in usable_backends().items():
        print(f"backend {name}: {'usable' if usable else 'not usable'}: {why}")
    usable, why = hopper.available()
    print(f"csrc's product for Hopper (plan gemm): {'usable' if usable else 'not usable'}: {why}")
    print(f"backend auto takes {explain_auto()}")
    for name, extension in (("CUDA", cuda), ("CPU", cpu)):
        for key, value in extension.build_info().items():
            print(f"{name} extension {key}: {value}")


def _settings(options) -> None:
    from ckf.settings import settings_page

    print(settings_page(), end="")


def _tune(options) -> None:
    from ckf.kernels import tune

    if min(options.tasks, options.r, *(options.rows or [1])) < 1:
        raise ValueError("--tasks, --r and --rows are 1 or more")
    groups = tune.LAYERS
    if options.model is not None:
        from ckf.sizes import linear_groups, read_config

        groups = linear_groups(read_config(options.model))
    calls = tune.calls_of(groups, options.tasks, options.r, options.rows or tune.TRAIN_ROWS)
    file = tune.tune(calls)
    print(f"backend auto goes by {file} from now on; remove it to forget")


def _print_sizes(options) -> None:
    from ckf.sizes import describe, model_sizes, read_config

    sizes = model_sizes(
        read_config(options.model),
        [f"task{index}" for index in range(options.tasks)],
        options.base,
        r=options.r,
        shared_r=options.shared_r,
        gate=options.gate,
    )
    for what, amount in describe(sizes, options.tokens):
        print(f"{what:24}{amount}")
    print("activations are an estimate: unfused elementwise operations, attention fused")


class _progress:
    """Progress bars by title; entered around an evaluation."""

    def __enter__(self):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self.bars = Progress(
            "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )
        self.bars.start()
        return self.start

    def start(self, title: str, total: int):
        bar = self.bars.add_task(f"evaluating {title}", total=total)
        return lambda rows: self.bars.advance(bar, rows)

    def __exit__(self, *_error) -> None:
        self.bars.stop()


if __name__ == "__main__":
    sys.exit(main())
