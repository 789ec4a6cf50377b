"""Spec Decode in the browser: `python app.py`, also the entry point of the Hugging Face Space.

Parses flags, serves the page at once and loads the model in the background. With `--replay FILE` it plays a trace back,
with `--replay-only` it shows the recordings that come with it, and neither needs a model. Exit code 1 when it cannot
serve, 2 for bad flags.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
from collections.abc import Callable
from ipaddress import ip_address

from spec_decode import flags, text
from spec_decode.errors import UserError
from spec_decode.loading import catalog
from spec_decode.sources import Source, replay
from spec_decode.ui import Engine, Limits, agents, build, launch_options

# What a visitor may take where strangers may come, unless the flags say otherwise.
PUBLIC = Limits(new_tokens=1024, seconds=120, lab=False, measure=False)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a bad flag exits with code 2."""
    parser = argparse.ArgumentParser(prog="app.py", description="Watch, measure and trust speculative decoding.")
    flags.add(parser)
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address to listen on"
    )
    parser.add_argument("--port", type=_port, help="port to listen on (default: GRADIO_SERVER_PORT, else from 7860 up)")
    parser.add_argument("--replay", metavar="FILE", help="play a trace back; no model is loaded, whatever else is said")
    parser.add_argument(
        "--speed", type=_factor, default=1.0, metavar="X", help="of a replay, relative to the recording (default: 1)"
    )
    parser.add_argument(
        "--replay-only",
        action="store_true",
        default=os.environ.get("SPEC_DECODE_REPLAY_ONLY", "") not in ("", "0"),
        help="load no model and show the recordings that come with the app (also: SPEC_DECODE_REPLAY_ONLY=1)",
    )
    parser.add_argument("--share", action="store_true", help="open a public gradio.live link")
    parser.add_argument("--max-queue", type=int, default=32, help="visitors that may wait (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens-limit",
        type=_whole,
        metavar="N",
        help=f"new tokens a race may ask for, 0 for any number (default: {PUBLIC.new_tokens} where other machines can "
        "reach the page, else any number)",
    )
    parser.add_argument(
        "--max-seconds",
        type=_whole,
        metavar="S",
        help=f"seconds after which a race is stopped, 0 for never (default: {PUBLIC.seconds:g} where other machines "
        "can reach the page, else never)",
    )
    parser.add_argument(
        "--lab",
        action=argparse.BooleanOptionalAction,
        help="the exactness lab, whose tests take the device for up to minutes, and the endpoint /prove (default: on, "
        "but off where other machines can reach the page)",
    )
    parser.add_argument(
        "--mcp",
        action="store_true",
        default=os.environ.get("GRADIO_MCP_SERVER", "").lower() == "true",
        help="offer race, advise and prove as tools for agents (MCP), at gradio_api/mcp/; needs the package mcp",
    )
    parser.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        help="measuring draft lengths on a visitor's prompts, which takes minutes, in turns with the races of others, "
        "and the endpoint /advise (default: on, but off where other machines can reach the page)",
    )
    arguments = parser.parse_args(argv)
    arguments.limits = limits(arguments)
    try:
        arguments.choice = flags.read(arguments)
        arguments.recording = None
        if arguments.replay:
            arguments.recording = replay.ReplaySource(replay.read(arguments.replay), arguments.speed)
    except UserError as error:
        parser.error(str(error))
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted; returns the exit code."""
    arguments = parse(argv)
    if why := _unbindable(arguments.host):
        print(
            f"app.py: cannot serve on {arguments.host}: {why}; choose an address of this machine with --host.",
            file=sys.stderr,
        )
        return 1

    if arguments.mcp and (why := agents.unavailable()):
        print(f"app.py: {why}.", file=sys.stderr)
        return 1

    def load(progress: Callable[[str], None]) -> Source:
        return arguments.recording or _local(arguments, progress)

    bare = arguments.replay_only and not arguments.recording
    engine = Engine(None if bare else load, thinking=arguments.thinking, limits=arguments.limits)
    page = build(engine, arguments.max_queue, recordings=not arguments.recording)
    try:
        _, url, _ = page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            share=arguments.share or None,
            prevent_thread_lock=True,
            mcp_server=arguments.mcp,
            **launch_options(),
        )
    except OSError as error:
        taken = "Cannot find empty port" in str(error)
        port = arguments.port or os.environ.get("GRADIO_SERVER_PORT", "7860 to 7959")
        why = f"port {port} is taken; choose another with --port" if taken else str(error)
        print(f"app.py: cannot serve on {arguments.host}: {why}.", file=sys.stderr)
        return 1
    if page.mcp_error:
        print(f"app.py: cannot serve tools for agents: {page.mcp_error}", file=sys.stderr)
        page.close()
        return 1
    print(f"Spec Decode is at {url}", flush=True)
    engine.start()
    page.block_thread()
    return 0


def _local(arguments: argparse.Namespace, progress: Callable[[str], None]) -> Source:
    """The pair that the flags name, loaded, with the drafters that every visitor may choose."""
    from spec_decode.loading.pair import load_pair
    from spec_decode.sources.local import LocalSource

    pair = load_pair(**arguments.choice, progress=progress)
    if arguments.thinking:
        text.require_thinking(pair.tokenizer)
    offered = catalog.drafters(arguments.choice["target"])
    return LocalSource(pair, own=arguments.choice["drafter"], drafters=offered)


def limits(arguments: argparse.Namespace) -> Limits:
    """What a race may take: what the flags say, else `PUBLIC` if other machines can reach the page. A replay takes
    nothing of the device."""
    shared = arguments.share or os.environ.get("GRADIO_SHARE", "").lower() == "true"
    shared = shared or os.environ.get("SYSTEM") == "spaces" or not _loopback(arguments.host)
    usual = PUBLIC if shared and not arguments.replay else Limits()
    tokens, seconds = arguments.max_new_tokens_limit, arguments.max_seconds
    return Limits(
        usual.new_tokens if tokens is None else tokens or None,
        usual.seconds if seconds is None else seconds or None,
        not shared if arguments.lab is None else arguments.lab,
        not shared if arguments.measure is None else arguments.measure,
    )


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise argparse.ArgumentTypeError(f"a whole number, 0 for no limit, not {text[:80]!r}")
    return int(text)


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise argparse.ArgumentTypeError(f"a speed is a number above 0, not {text[:80]!r}")
    return factor


def _unbindable(host: str) -> str | None:
    """Why nothing can listen on `host`, whatever the port; None where something can."""
    why: str | None = None
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host.strip("[]") or None, 0, type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind, protocol) as tried:
                try:
                    tried.bind(address)
                    return None
                except OSError as error:
                    why = error.strerror or str(error)
    except OSError as error:
        why = error.strerror or str(error)
    except ValueError:
        why = "it is no address"
    return why


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"a port is a number from 1 to 65535, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
