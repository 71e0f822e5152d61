"""A process with stock transformers imported, which forks itself for each program that the tests give it.

The tests prove some sixty folders and run some thirty other programs, and each one's process would import transformers
anew, for seconds. A fork of a process that has imported nothing else, and this package never, shows the same. What libraries
read from their environment when they are imported is read again in the fork. How the package starts its own process is
tested by the tests marked `own_process`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_SERVER = """
import gc
gc.disable()  # there is no garbage among what is imported, and looking for some takes as long as importing does
import atexit, importlib, json, os, sys, traceback, types
sys.path += [place for place in sys.argv[1].split(os.pathsep) if place not in sys.path]
import hashlib, logging, random, numpy, torch, transformers
import transformers.dynamic_module_utils, transformers.modeling_utils, transformers.models.bert.modeling_bert
import transformers.trainer  # training programs need it
import datasets.config, huggingface_hub.constants
from safetensors.torch import load_file, save_file
assert "hf_lambda_gelu" not in sys.modules
gc.freeze()

def settings(env):  # what the libraries read from their environment when they are imported, and copies that modules keep
    for holder in (huggingface_hub.constants, datasets.config):
        before = dict(vars(holder))
        changed = {k: v for k, v in vars(importlib.reload(holder)).items() if k.isupper() and before.get(k) != v}
        for module in [m for m in sys.modules.values() if hasattr(m, "__dict__")]:
            for name in changed.keys() & vars(module).keys():
                if vars(module)[name] == before.get(name):
                    vars(module)[name] = changed[name]
    modules = env.get("HF_MODULES_CACHE") or os.path.join(huggingface_hub.constants.HF_HOME, "modules")
    transformers.utils.hub.HF_MODULES_CACHE = transformers.dynamic_module_utils.HF_MODULES_CACHE = modules
    transformers.logging.set_verbosity(getattr(logging, env.get("TRANSFORMERS_VERBOSITY", "warning").upper()))

def run(job):
    gc.enable()
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(job[name], os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[:0] = job["path"]
    sys.argv = ["-c", *job["arguments"]]
    code = 0
    try:
        settings(job["env"])
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(job["program"], "<string>", "exec"), vars(main))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    child = os.fork()
    if not child:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""

_servers: list[subprocess.Popen[str]] = []
_LOCK = threading.Lock()


def _server() -> subprocess.Popen[str]:
    """This worker's, started for its first program; it ends with its standard input."""
    if not _servers:
        homes = os.pathsep.join(dict.fromkeys(place for place in sys.path if "site-packages" in place))
        _servers.append(
            subprocess.Popen(
                [sys.executable, "-I", "-c", _SERVER, homes],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
    return _servers[0]


def run_in_stock(
    program: str, arguments: Sequence[str], cwd: str, env: Mapping[str, str], path: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, "-I", "-c", program, *arguments], …)` would do it.

    Args:
        path: places that the program finds modules in, before all others.
    """
    with _LOCK, tempfile.TemporaryDirectory() as scratch:
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        files = {name: str(Path(scratch, name)) for name in ("stdout", "stderr")}
        job = {"program": program, "arguments": list(arguments), "cwd": cwd, "env": dict(env), "path": list(path), **files}
        print(json.dumps(job), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        stdout, stderr = (Path(place).read_text() for place in files.values())
    return subprocess.CompletedProcess(list(arguments), code, stdout, stderr)
