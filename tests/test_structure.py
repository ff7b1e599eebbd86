"""The structure: the order of imports, docstrings, and commands that explain themselves."""

import ast
import re

import pytest
from launches import REPOSITORY, run_module

PACKAGE = REPOSITORY / "baichuan_jax"
FILES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# From the bottom up: a package, or a module beside them, imports only what stands above it here.
ORDER = [
    "config",
    "hardware",
    "runs",
    "resilience",
    "sharding",
    "xla_flags",
    "documents",
    "tokenizer",
    "kernels",
    "model",
    "loss",
    "optimizer",
    "exchange",
    "step",
    "checkpoint",
    "hf",
    "data",
    "preflight",
    "generate",
    "evaluate",
    "training",
    "train",
    "launch",
    "plan",
    "report",
]
COMMANDS = [
    "train",
    "launch",
    "preflight",
    "resilience",
    "generate",
    "evaluate",
    "hf",
    "tokenizer",
    "kernels",
    "data.rows",
    "data.quality",
    "data.decontaminate",
    "data.mixture",
    "data.pipeline",
    "plan",
    "xla_flags",
    "report",
]


def imports(nodes) -> set[str]:
    """Modules of the package that these statements import, without the package's name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("baichuan_jax.") for alias in node.names), (
                f"line {node.lineno}: from baichuan_jax... import ..."
            )
        if not isinstance(node, ast.ImportFrom):
            continue
        assert node.level == 0, f"line {node.lineno}: a relative import"
        if node.module and node.module.startswith("baichuan_jax"):
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                found.add(inner if inner in FILES else node.module)
    return {name.removeprefix("baichuan_jax.") for name in found} - {"baichuan_jax"}


def tree_of(name: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def package_of(module: str) -> str:
    """The package or top-level module that a module belongs to."""
    return module.split(".")[0]


def test_every_package_has_its_place_and_the_top_level_is_short():
    packages = {package_of(name.removeprefix("baichuan_jax.")) for name in FILES} - {
        "baichuan_jax",
        "__main__",
    }
    assert packages == set(ORDER)
    modules = [path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")]
    assert len(modules) <= 14, sorted(modules)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_run_downward(name):
    """At the head of a file and inside its functions."""
    module = name.removeprefix("baichuan_jax.")
    if module == "baichuan_jax":
        # Its functions import what a name stands for at the name's first use.
        assert imports(tree_of(name).body) == set()
        return
    for imported in imports(ast.walk(tree_of(name))):
        if package_of(module) not in ("__main__", package_of(imported)):
            assert ORDER.index(package_of(imported)) < ORDER.index(package_of(module)), (
                f"{module} imports {imported}"
            )


def test_there_is_no_cycle():
    graph = {name.removeprefix("baichuan_jax."): imports(tree_of(name).body) for name in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("name", sorted(FILES))
def test_everything_public_has_a_docstring(name):
    tree = tree_of(name)
    assert ast.get_docstring(tree), name
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            settings = isinstance(node, ast.ClassDef) and node.name.endswith(
                "Config"
            )  # explained field by field
            assert settings or ast.get_docstring(node), f"{name}.{node.name}"


# Calls that may block for long and stand in no `with announced(...)` of resilience/waits.py, with
# what bounds them and who says what is waited for.
WAITS = {
    ("resilience.coordination", "blocking_key_value_get"): "announced by _in_time; `seconds`",
    ("resilience.coordination", "wait_at_barrier"): "announced by _in_time; `seconds` of gather",
    ("resilience.processes", "initialize"): "announced by _in_time; JOIN_SECONDS",
    ("resilience.ownership", "flock"): "does not block; STOPPING_SECONDS or CACHE_SECONDS",
    ("resilience.ownership", "wait"): "BEAT, in a thread",
    ("resilience.boards", "join"): "PUBLISH: the process is leaving",
    ("resilience.watch", "sleep"): "BEAT, or GRACE at most: the process is leaving",
    ("resilience.watch", "wait"): "BEAT, in threads",
    ("resilience.watch", "get"): "of a queue that is not empty",
    ("launch", "sleep"): "BEAT of the heartbeat; TICK of loops that say what they wait for",
    ("checkpoint.orbax", "wait_until_finished"): "announced by the store; Orbax's ten minutes",
    ("checkpoint.orbax_workarounds", "sleep"): "READS_END_SECONDS",
    ("checkpoint.local_copies", "join"): "announced by the store; a write, and TIMEOUT_SECONDS",
    ("checkpoint.local_copies", "shutdown"): "of threads that hash one part each",
    ("checkpoint.local_copies", "broadcast_one_to_all"): "announced by its caller; the watch",
    ("data.loader", "join"): "CLOSE_SECONDS, not more than SAY_SECONDS",
    ("data.runner", "as_completed"): "announced after STALLED_SECONDS; work with a progress bar",
    ("data.runner", "result"): "of a part that has ended",
    ("data.runner", "join"): "in a thread, for the parent's end",
    ("data.runner", "wait"): "announced after STALLED_SECONDS; Ray's tasks, with a progress bar",
    ("data.runner", "get"): "of a task that has ended",
    ("data.runner", "shutdown"): "does not wait, after an error",
    ("runs.metrics", "get"): "in the thread that calls Weights & Biases",
    ("runs.metrics", "put"): "announced by close_files; WANDB_SECONDS",
    ("runs.metrics", "join"): "announced by close_files; WANDB_SECONDS",
    ("hardware.accelerators", "run"): "announced by apply_flags; DRIVER_SECONDS",
    ("plan.child", "wait"): "after Ctrl-C, which the child got too",
}
BLOCKING = {
    *("sleep", "flock", "lockf", "communicate", "result", "as_completed", "wait_until_finished"),
    *("blocking_key_value_get", "wait_at_barrier", "sync_global_devices", "broadcast_one_to_all"),
    *("process_allgather", "urlopen", "wait", "acquire", "shutdown", "waitpid", "get_file_info"),
    *("recv", "accept", "check_output", "check_call"),
}
# What has these names and does not wait.
NO_WAITS = {
    ("training.setup", "watch.join()"): "a method of the program",
    ("data.quality", "space.join(cut)"): "of text",
}


def is_blocking(module: str, call: ast.Call) -> bool:
    """Whether a call may wait for another thread, process or host."""
    assert isinstance(call.func, ast.Attribute)
    name, owner = call.func.attr, call.func.value
    keywords = {keyword.arg for keyword in call.keywords}
    if (module, ast.unparse(call)) in NO_WAITS:
        return False
    match name:
        case "join":
            # Of text, of paths, of tables and of Triton's tensors.
            lists = (ast.List, ast.ListComp, ast.GeneratorExp)
            return not (
                isinstance(owner, ast.Constant | ast.JoinedStr)
                or any(isinstance(argument, lists) for argument in call.args)
                or ast.unparse(owner).endswith("path")
                or ast.unparse(owner) == "tl"
                or "on" in keywords
            )
        case "get" | "put":
            queues = "import queue" in FILES[f"baichuan_jax.{module}"].read_text()
            # Keys of a dict, and context variables.
            return ast.unparse(owner) == "ray" or (
                queues and (not call.args or "timeout" in keywords)
            )
        case "init" | "initialize" | "run" | "collect":
            return ast.unparse(owner) in ("ray", "jax.distributed", "subprocess", "frame")
    return name in BLOCKING


def silent_waits(module: str) -> set[tuple[str, str]]:
    """Blocking calls of a module that stand in no `with announced(...)`."""
    found = set()

    def visit(node: ast.AST, announced: bool) -> None:
        if isinstance(node, ast.With):
            announced |= any("announced(" in ast.unparse(item) for item in node.items)
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if called and not announced and is_blocking(module, node):
            found.add((module, node.func.attr))
        for child in ast.iter_child_nodes(node):
            visit(child, announced)

    visit(tree_of(f"baichuan_jax.{module}"), False)
    return found


def test_no_wait_is_silent_or_without_a_limit():
    modules = [name.removeprefix("baichuan_jax.") for name in FILES if name != "baichuan_jax"]
    assert set().union(*map(silent_waits, modules)) == set(WAITS)


def test_a_new_wait_without_a_word_is_found(tmp_path, monkeypatch):
    file = tmp_path / "new.py"
    monkeypatch.setitem(FILES, "baichuan_jax.new", file)
    for line, found in (
        ("thread.join(5)", {("new", "join")}),
        ("event.wait(timeout=3)", {("new", "wait")}),
        ("import queue; calls.get()", {("new", "get")}),
        ("subprocess.run(command)", {("new", "run")}),
        ("', '.join(names), table.join(other, on='key'), names.get('a')", set()),
        ("with announced('it (3 s at most)'): thread.join(3)", set()),
    ):
        file.write_text(line)
        assert silent_waits("new") == found, line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_without_starting_jax(command):
    done = run_module(f"baichuan_jax.{command}", "--help", seconds=60)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout.lower()
    assert f"python -m baichuan_jax.{command}" in done.stdout
    assert not re.search(" at 0x[0-9a-f]+", done.stdout)
    assert done.stderr == ""


def test_the_readmes_say_the_same_and_name_commands_that_exist():
    """Both READMEs have the same headings, and every command they name exists."""
    english, chinese = (
        (REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")
    )
    levels = [
        [line.split(" ")[0] for line in text.splitlines() if line.startswith("#")]
        for text in (english, chinese)
    ]
    assert levels[0] == levels[1]
    blocks = [
        [block.split("```")[0] for block in text.split("```")[1::2]] for text in (english, chinese)
    ]
    assert len(blocks[0]) == len(blocks[1])
    for text in (english, chinese):
        for module in re.findall(r"python -m (baichuan_jax(?:\.[a-z_]+)+)", text):
            assert module in FILES


def test_the_package_lists_its_commands():
    from baichuan_jax.__main__ import COMMANDS as listed

    assert sorted(name for group in listed.values() for name in group) == sorted(COMMANDS)


def test_the_clock_of_the_day_only_says_when_something_happened():
    """It jumps: what waits, measures or decides takes time.monotonic()."""
    readers = {
        "runs.events": "when an event happened",
        "runs.metrics": "when a line was written, for TensorBoard too",
        "resilience.watch": "when a report was made",
        "resilience.ownership": "since when a folder is owned, in messages",
        "preflight": "when a host was checked",
        "resilience.host_processes": "when a process ended",
        "launch": "when a verdict was reached",
    }
    found = {name for name, path in FILES.items() if "time.time()" in path.read_text()}
    assert found == {f"baichuan_jax.{name}" for name in readers}
