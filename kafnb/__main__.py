"""Run the notebooks of the companion to a thesis on kernel activation functions, and draw their figures."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (pip checks it, a bare clone does not)
    print(f"kafnb needs Python 3.11 or newer, this is {sys.version.split()[0]}", file=sys.stderr)
    sys.exit(2)

import argparse


class _Parser(argparse.ArgumentParser):
    """One line, whatever line ends the arguments hold."""

    def error(self, message):
        super().error(" ".join(message.split()))


def _parser():
    parser = _Parser(prog="python -m kafnb", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    figures = commands.add_parser("figures", help="run the notebooks and write their figures")
    figures.add_argument(
        "--profile",
        default="quick",
        choices=("quick", "small", "paper"),
        help="digits in minutes, CIFAR-10 reduced for a CPU, or at the thesis' size for a GPU",
    )
    figures.add_argument("--only", nargs="+", default=(), metavar="NN", help="numbers or names of notebooks")
    figures.add_argument("--seed", type=int, default=0, help="of training and attacks")
    figures.add_argument("--device", default="auto", help="auto, cpu or cuda")
    figures.add_argument("--data-root", metavar="PATH", help="where CIFAR-10 is, or a train/, test/ image tree")
    figures.add_argument("--jobs", type=int, help="notebooks at a time (default: one a core on CPU)")
    figures.add_argument("--engine", default="local", help="where models train: local, processes or ray")
    figures.add_argument("--address", help="of a running Ray cluster (default: one is started on this machine)")
    figures.add_argument("--dry-run", action="store_true", help="the same cells on few images, kept apart in runs/dry/")
    figures.add_argument("--stored", action="store_true", help="train and attack nothing: draw what is in results/")
    figures.add_argument("--keep", action="store_true", help="also store the outputs in notebooks/ (profile quick)")
    return parser


def main(argv=None):
    args = _parser().parse_args(argv)
    from . import dryrun, summary
    from .data import load_data
    from .notebooks import keep_outputs, run_notebooks, select
    from .profiles import PROFILES, resolve_data, resolve_device

    try:
        if args.keep and (args.profile != "quick" or args.dry_run):
            raise ValueError("--keep is for profile quick: stored outputs are what the tests compare with")
        if args.dry_run and args.profile == "quick":
            raise ValueError("--dry-run is for profiles small and paper: quick is as small as its checks allow")
        if args.address and args.engine != "ray":
            raise ValueError("--address is that of a Ray cluster: say --engine ray, too")
        if args.jobs is not None and args.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
        if args.data_root:
            from pathlib import Path

            if not Path(args.data_root).is_dir():
                raise ValueError(f"--data-root: no folder {args.data_root}")
            args.data_root = Path(args.data_root).absolute()
        if args.dry_run:
            args.data_root = dryrun.prepare()
            args.device = resolve_device(args.device)
        elif args.profile != "quick" and not args.stored:  # once and at once, not in every notebook
            select(args.only)
            resolve_device(args.device, PROFILES[args.profile].needs_gpu)
            load_data(resolve_data(PROFILES[args.profile], args.data_root), args.data_root)
        outcomes = run_notebooks(
            args.profile, args.only, args.seed, args.device, args.data_root, args.jobs, args.engine, args.address,
            args.stored,
        )  # fmt: skip
        for o in outcomes:
            if args.keep and not o.error:
                keep_outputs(o.name)
        if args.keep or (args.profile != "quick" and not args.dry_run):
            summary.write()
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"kafnb: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kafnb: stopped; what was trained so far is kept, the same command goes on", file=sys.stderr)
        return 130
    failed = [o for o in outcomes if o.error]
    for o in failed:
        print(f"kafnb: {o.name}: {o.error}", file=sys.stderr)
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} notebooks done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
