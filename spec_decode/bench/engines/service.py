"""What an engine does on request, in our process or in its own.

In: requests as JSON objects. Out: answers as JSON objects. Imports no torch.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

from . import KINDS, Engine, Job
from .tuning import tune


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Executes `request` on `engine` and returns the result as an object.

    {"do": "tune", "counts", "prompts"}: finds the fastest settings.
    {"do": "use", "threads", "option"}: takes these settings.
    {"do": "run", "ids", "tokens", "temperature", "seed"}: {"ids", "first", "seconds", "head", "tokens_per_second",
        "drafted", "accepted"}.
    {"do": "draw", "ids", "tokens", "temperature", "seeds", "stop"}: {"ids"}, for each seed the emitted tokens; "stop"
        says whether stop tokens end them.
    {"do": "predict", "texts", "last", "path"}: writes `[texts, last, vocabulary]` log-probabilities to a file of NumPy;
        {"given": False} where the engine gives none.

    Where "temperature" or "seed" is left out, the job's holds.
    """
    job = engine.job
    engine.job = replace(job, temperature=request.get("temperature", job.temperature))
    try:
        return _answered(engine, request)
    finally:
        engine.job = job


def _answered(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "tune":
        tuned = tune(engine, request["counts"], request["prompts"])
        return {**engine.facts(), "threads": tuned.threads, "option": tuned.option, "trials": tuned.trials}
    if request["do"] == "use":
        engine.use(request["threads"], request["option"])
        return {}
    if request["do"] == "draw":
        ids, tokens, stop = request["ids"], request["tokens"], request["stop"]
        runs = [engine.run(ids, tokens, stop, seed) for seed in request["seeds"]]
        return {"ids": [run.ids for run in runs]}
    if request["do"] == "predict":
        return _predicted(engine, request)
    run = engine.run(request["ids"], request["tokens"], seed=request.get("seed"))
    return {
        "ids": run.ids,
        "first": run.first,
        "seconds": run.seconds,
        "head": run.head,
        "tokens_per_second": run.rate,
        "drafted": run.drafted,
        "accepted": run.accepted,
    }


def _predicted(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    found = []
    for ids in request["texts"]:
        of_text = engine.predict(ids, request["last"])
        if of_text is None:
            return {"given": False}
        found.append(of_text)
    np.save(request["path"], np.stack(found).astype(np.float32))
    return {"given": True}


def serve() -> None:
    """Reads requests until the input ends, and closes the engine."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the output of engines goes to stderr

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    engine: Engine | None = None
    try:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if engine is None:
                    engine = KINDS[request["engine"]].make(Job(**request["job"]))
                    reply({})
                else:
                    reply(answer(engine, request))
            except Exception as error:  # the benchmark continues without this engine
                reply({"error": " ".join(str(error).split())[:300] or type(error).__name__})
    finally:
        if engine is not None:
            engine.close()
