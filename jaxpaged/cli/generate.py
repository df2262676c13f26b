"""`jaxpaged generate`: reads the input, takes up an earlier run's output, and runs what is left.

Whatever can be refused is refused before the model is loaded, which may take minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.outputs import RequestOutput
from jaxpaged.api.values import check_encodable, read_seed
from jaxpaged.batch import (
    BatchContext,
    BatchRequest,
    InvalidLine,
    ResultStream,
    WriteError,
    check_requests,
    error_row,
    failure_row,
    format_of_name,
    journal_of,
    make_params,
    make_request,
    open_packed_file,
    open_result_file,
    packing_of,
    parse_batch,
    read_data,
    result_row,
    run_batch,
)
from jaxpaged.batch.input_formats import FORMATS
from jaxpaged.batch.model_files import digest, model_identity
from jaxpaged.batch.requests import BEAM_ONLY
from jaxpaged.batch.resume import EarlierRun
from jaxpaged.cli import run_report, texts
from jaxpaged.cli.chat_template_file import read_template
from jaxpaged.cli.constraint_flags import CONSTRAINT_FLAGS, constraint_files, given_constraint
from jaxpaged.cli.errors import UsageError, usage_errors
from jaxpaged.cli.flags import BEAM_FLAGS, MODEL_FLAGS, MODEL_HELP, PROMPT_FLAGS, SAMPLING_FLAGS, add_flags, given
from jaxpaged.cli.interrupts import exit_at_interrupt
from jaxpaged.cli.model import settle_model
from jaxpaged.cli.output_files import check_outputs
from jaxpaged.config.options import RESULT_OPTIONS
from jaxpaged.study.account_file import check_account_name, write_account
from jaxpaged.text.added_tokens import COMPANIONS

STDOUT = 1
EPILOG = """\
input files, by the end of their name (without one, and of '-', by their first line), all but Parquet also gzipped:
  .txt, a prompt a line; .csv, .tsv, .parquet and .json, a prompt a row; .jsonl, an object a line, either
  {"prompt": "..."}, {"prompt_token_ids": [...]} or {"messages": [...]}, with "id" and any parameter, or an OpenAI
  batch line {"custom_id": "...", "method": "POST", "url": "/v1/completions", "body": {"prompt": "...", ...}}, also for
  "/v1/chat/completions" with {"messages": [...], ...}
  Flags are the defaults of lines that do not say otherwise. What else a line has is carried to its row.

A run that was stopped, at any moment and in any way, goes on when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeat for more")
    source.add_argument("--input", metavar="FILE", help="a file of prompts, '-' for standard input")
    parser.add_argument(
        "--shared-prefix", metavar="TEXT", help="comes before every prompt; computed once and stored once for all"
    )
    parser.add_argument("--chat-template", metavar="FILE", help="of lines with messages, in place of the model's own")
    parser.add_argument(
        "--prompt-column", metavar="NAME", help="the column or key with the prompts (default: prompt, messages or text)"
    )
    parser.add_argument("--format", choices=FORMATS, default="auto", help="of the input (default: by its name)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        default="-",
        help="rows of JSON, as .parquet or .jsonl.gz where its name ends so (default '-': standard output)",
    )
    texts.add_arguments(parser)
    parser.add_argument("--account", metavar="FILE", help="write where memory was at every step, as .csv or .json")
    parser.add_argument("--overwrite", action="store_true", help="start anew where the output has results already")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N",
        help="of lines without a seed of their own, each of which gets one made of N and its line number (default 0)",
    )  # fmt: skip
    add_flags(parser, "prompts", PROMPT_FLAGS)
    add_flags(parser, "sampling", SAMPLING_FLAGS)
    add_flags(parser, "beam search, with --beam-width", BEAM_FLAGS)
    add_flags(parser, "what outputs are to be: one of", CONSTRAINT_FLAGS)
    add_flags(parser, "model and memory", MODEL_FLAGS)
    run_report.add_arguments(parser)


def run(args: argparse.Namespace, make_llm: Callable[..., Any]) -> int:
    try:
        return _generate(args, make_llm)
    except WriteError as error:
        print(f"jaxpaged: {error}; mend that and give the same command again to go on", file=sys.stderr)
        return 1


def _generate(args: argparse.Namespace, make_llm: Callable[..., Any]) -> int:
    texts.check(args)
    settle_model(args)
    context = _context(args)
    lines = _lines(args, context)
    _check_used(context, lines)
    _check_outputs(args)
    results, earlier = _open_output(args, lines)
    if earlier.done and not args.quiet:
        print(f"jaxpaged: {args.output} has {len(earlier.done)} of {len(lines)} lines already", file=sys.stderr)
    left = [line for line in lines if line.index not in earlier.done]
    if args.text:
        results = texts.PrintedTexts(None if args.output == "-" else results, [line.index for line in left])
    invalid = [line for line in left if isinstance(line, InvalidLine)]
    requests = [line for line in left if isinstance(line, BatchRequest)]
    if args.account is not None and not requests and not args.quiet:
        print("jaxpaged: nothing is left to run, so no account is written", file=sys.stderr)
    try:
        for line in invalid:
            results.write(error_row(line, line.reason))
        remedy = "" if args.output == "-" else "; the same command (without --overwrite) goes on from here"
        with exit_at_interrupt(remedy):  # the output is made for processes that are killed
            failures = _run(args, requests, results, earlier, len(invalid), make_llm) if requests else []
        results.finish()
    finally:
        results.close()
    failed = earlier.failed | {line.index for line in (*invalid, *failures)}
    if failed and args.prompt is None:
        _report_failed("" if args.text and args.output == "-" else args.output, failed, len(lines))
    return 1 if failed else 0


def _context(args: argparse.Namespace) -> BatchContext:
    params, options = given(args, (*SAMPLING_FLAGS, *BEAM_FLAGS)) | given_constraint(args), given(args, MODEL_FLAGS)
    with usage_errors("--"):
        read_seed(args.seed)
    with usage_errors():
        # Flags of beams without --beam-width are for lines that give one.
        make_params({}, params if "beam_width" in params else {n: v for n, v in params.items() if n not in BEAM_ONLY})
        models = [model_identity(args.model)]
        if "tokenizer" in options:
            models += [model_identity(path) for path in _tokenizer_files(Path(options["tokenizer"]))]
    deciding = {name: options[name] for name in RESULT_OPTIONS if name in options}
    decides = [models, deciding, args.seed]
    settings: dict[str, Any] = {"model": models[0]} | ({"--tokenizer": digest(models[1:])} if models[1:] else {})
    settings |= {"--" + name.replace("_", "-"): value for name, value in {**deciding, "seed": args.seed}.items()}
    if args.shared_prefix is not None:
        with usage_errors("--shared-prefix: "):
            check_encodable(args.shared_prefix, "the text")
            if not args.shared_prefix:
                raise ValueError("the text is empty: leave it out to share nothing")
        decides.append(args.shared_prefix)
        settings["--shared-prefix"] = args.shared_prefix
    adds_special_tokens = _adds_special_tokens(args)
    if not adds_special_tokens:
        decides.append({"add_special_tokens": False})
        settings["--no-special-tokens"] = True
    identity = digest(decides)
    options_in_words = repr((identity, sorted(options.items()), *filter(None, [args.prompt_column])))
    template = read_template(args.chat_template)
    return BatchContext(
        params, args.seed, identity, options_in_words, adds_special_tokens, settings, template, args.prompt_column
    )


def _tokenizer_files(path: Path) -> list[Path]:
    """A directory, or a file with those beside it that belong to it."""
    beside = [path.parent / name for name in COMPANIONS] if path.suffix == ".model" else []
    return [path, *(file for file in beside if file.is_file())]


def _adds_special_tokens(args: argparse.Namespace) -> bool:
    return given(args, PROMPT_FLAGS).get("add_special_tokens", True)


def _shared_prefix(args: argparse.Namespace) -> Any:
    if args.shared_prefix is None or _adds_special_tokens(args):
        return args.shared_prefix
    return {"prompt": args.shared_prefix, "add_special_tokens": False}


def _lines(args: argparse.Namespace, context: BatchContext) -> Sequence[BatchRequest | InvalidLine]:
    if args.prompt is not None:
        with usage_errors("--prompt: "):
            for prompt in args.prompt:  # bytes of the command line that are no UTF-8 arrive as such characters
                check_encodable(prompt, "the text")
            return [make_request(i, str(i), [prompt], {}, context) for i, prompt in enumerate(args.prompt)]
    with usage_errors(f"{args.input}: "):
        file_format = format_of_name(args.input, args.format)
    with usage_errors("cannot read the input: "):
        data, cut = read_data(args.input, file_format.is_gzip)
    with usage_errors(f"{args.input}: "):
        lines = parse_batch(data, context, file_format, cut)
    if not lines and not args.quiet:
        print(f"jaxpaged: {args.input} has no prompts", file=sys.stderr)
    return lines


def _check_used(context: BatchContext, lines: Sequence[BatchRequest | InvalidLine]) -> None:
    """A flag of beam search that no line makes use of is a mistake."""
    flags = [flag for flag in BEAM_FLAGS if flag.name in context.params]
    requests = [line for line in lines if isinstance(line, BatchRequest)]
    if flags and requests and not any(isinstance(p, BeamSearchParams) for line in requests for p in line.params):
        option = "--" + flags[0].name.replace("_", "-")
        raise UsageError(f"{option} is for beam search, and no prompt asks for one: give --beam-width too")


def _check_outputs(args: argparse.Namespace) -> None:
    with usage_errors():
        check_account_name(args.account)
        output = None if args.output == "-" else Path(args.output)
        journal = None if output is None or packing_of(output) is None else journal_of(output)
        check_outputs(
            {"--output": output, "--output, whose rows go to": journal, "--account": args.account},
            {
                "input": None if args.input == "-" else args.input,
                "--chat-template": args.chat_template,
                **constraint_files(args),
            },
            {"MODEL": args.model, "--tokenizer": given(args, MODEL_FLAGS).get("tokenizer")},
        )


def _open_output(
    args: argparse.Namespace, lines: Sequence[BatchRequest | InvalidLine]
) -> tuple[ResultStream, EarlierRun]:
    if args.output == "-":
        return ResultStream(STDOUT), EarlierRun()
    path = Path(args.output)
    with usage_errors("cannot write the output: "):
        packing = packing_of(path)
        if packing is not None:
            return open_packed_file(path, packing, lines, args.overwrite)
        return open_result_file(path, lines, args.overwrite)


def _run(
    args: argparse.Namespace,
    requests: list[BatchRequest],
    results: ResultStream,
    earlier: EarlierRun,
    num_invalid: int,
    make_llm: Callable[..., Any],
) -> list[BatchRequest]:
    """Run what is left; returns the requests that the model refused, or that could not go on."""
    with usage_errors(
        kinds=(ValueError, OSError, RuntimeError)
    ):  # RuntimeError: what jax raises without memory or device
        llm = make_llm(model=args.model, seed=args.seed, **given(args, MODEL_FLAGS))
    accepted, refused = check_requests(llm, requests, _shared_prefix(args))
    for request, why in refused:
        if args.prompt is not None:
            raise UsageError(f"prompt {request.index + 1}: {why}")
        results.write(error_row(request, why))

    if args.text and llm.tokenizer is None:
        raise UsageError("--text prints texts, and the model has no tokenizer: name one with --tokenizer")
    on_terminal = (args.output == "-" or args.text) and sys.stdout.isatty()
    is_readable = on_terminal and args.prompt is not None and not args.text and args.output == "-"
    decode = None if llm.tokenizer is None else llm.tokenizer.decode
    failed = []

    def on_finished(request: BatchRequest, outputs: list[RequestOutput]) -> None:
        failure = failure_row(request, outputs)
        if failure is not None:
            failed.append(request)
        if is_readable:
            _print(outputs[0])
        elif failure is None:
            results.write(result_row(request, outputs, decode), request.settings)
        else:
            results.write(failure)
        if failure is not None and args.prompt is not None:
            print(f"jaxpaged: prompt {request.index + 1}: {outputs[0].error}", file=sys.stderr)
        report.add(request, outputs, failure is not None)

    num_done = len(earlier.done) + num_invalid
    report = run_report.RunReport(
        num_done + len(requests), num_done + len(refused), lambda: llm.last_run, args.quiet, on_terminal
    )
    with report:
        run_batch(llm, accepted, on_finished, _shared_prefix(args))
    report.say_summary(len(earlier.done), len(earlier.failed) + num_invalid + len(refused) + len(failed))
    if args.account is not None:
        with usage_errors("cannot write the account: "):
            write_account(llm.last_run, args.account)
    return [request for request, _ in refused] + failed


def _print(output: RequestOutput) -> None:
    print(f"> {output.prompt}")
    for sample in output.outputs:
        number = f"[{sample.index + 1}] " if len(output.outputs) > 1 else ""
        score = "" if sample.score is None else f"{sample.score:.4f} "
        print(f"{number}{score}{sample.text or sample.token_ids}")
    print(flush=True)


def _report_failed(output: str, failed: set[int], num_lines: int) -> None:
    numbers = [str(index + 1) for index in sorted(failed)]
    shown = ", ".join(numbers[:5]) + (", ..." if len(numbers) > 5 else "")
    where = {"-": "on standard output", "": "above"}.get(output, f"in {output}")
    print(f"jaxpaged: {len(numbers)} of {num_lines} lines failed: {shown}; the reasons are {where}", file=sys.stderr)
