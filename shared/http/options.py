"""The options that both servers' commands share. Their defaults stand in settings.py."""

from __future__ import annotations

import argparse


def add_key_options(parser: argparse.ArgumentParser, *, without: str) -> None:
    """Who may ask, and how much. `without`: what the server does where no key is given and --no-auth is not."""
    add = parser.add_argument_group("who may ask, and how much").add_argument
    add("--api-keys-file", metavar="FILE", help="names and hashes of API keys; `distill keygen NAME` makes one")
    add("--no-auth", action="store_true", help=f"where no key is given, answer whoever reaches the port (else: {without})")
    add("--requests-per-minute", metavar="N", help="of one key, in any 60 seconds; default: any number")
    add("--characters-per-day", metavar="N", help="generated for one key, from midnight to midnight UTC; default: any number")
    add("--concurrent-requests", metavar="N", help="of one key; default: any number")


def add_run_options(parser: argparse.ArgumentParser, *, port: int, log_level: str) -> None:
    """Where and how a server runs."""
    add = parser.add_argument_group("where and how").add_argument
    add("--host", help="default 127.0.0.1: this machine alone")
    add("--port", help=f"default {port}; 0 picks a free one")
    add("--metrics-port", metavar="PORT", help="tell numbers for Prometheus there, on the same host; default: nowhere")
    add("--log-level", help=f"debug, info (a line for every request, without its texts), warning or error; default {log_level}")
    add("--drain-s", metavar="S", help="what requests in flight get to finish after a signal to stop; default 7")
