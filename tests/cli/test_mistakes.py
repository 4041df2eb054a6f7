"""Users' mistakes: what surfw says about each, and the exit code."""

import subprocess
from pathlib import Path

import pytest

from tests.cli.run import SURFW, environment
from tests.services import warm
from tests.stores import make_store

MISTAKES = [
    # Commands.
    ("hepl", 2, "No such command 'hepl'. Did you mean 'help'?"),
    ("inferr --prompt a", 2, "No such command 'inferr'. Did you mean 'infer'?"),
    ("ls", 2, "No such command 'ls'. Did you mean 'list'?"),
    ("run my-model", 2, "No such command 'run'. Did you mean 'infer'?"),
    ("help sevre", 2, "No such command 'sevre'. Did you mean 'serve'?"),
    ("help list all", 2, "'surfw list' has no commands of its own, and no 'all'"),
    ("bench wier", 2, "No such command 'wier'. Did you mean 'wire'"),
    # Options.
    ("infer --promt a", 2, "No such option: --promt; did you mean --prompt or --prompts?"),
    ("--verison", 2, "No such option: --verison; did you mean --version?"),
    ("infer my-model Weight streaming is", 2, "(streaming is); a text with spaces goes between quotes"),
    (
        "infer 'Weight streaming is'",
        2,
        "'Weight streaming is' is no model's name; for a prompt alone write --prompt 'We",
    ),
    (f"infer '{'Weight streaming is ' * 20}'", 2, " is no model's name; for a prompt alone write --prompt 'Weight"),
    ("infer", 2, "there is no prompt: give either --prompt or --prompt-ids, or pipe one in"),
    ("infer --prompt ''", 2, "the prompt is empty; write a text, or pipe one in with --prompt -"),
    ("infer --prompt a --prompt-ids 1", 2, "--prompt-ids does not go with a prompt; give one of them"),
    ("infer my-model a --prompt b", 2, "--prompt does not go with PROMPT 'a'; give one of them"),
    (
        "infer second a --model org/first",
        2,
        "--model does not go with MODEL 'second'; give one of them (a prompt may also be --prompt)",
    ),
    ("infer ./store a --source ./store", 2, "--source does not go with MODEL './store', which is a source; give one"),
    ("infer --prompt a --system b --raw", 2, "--system does not go with --raw: a system message is part of the chat"),
    ("chat --system b --raw", 2, "--system does not go with --raw: a system message is part of the chat"),
    ("infer --prompt-ids 1 --system b", 2, "--system does not go with --prompt-ids, which are taken as they are"),
    ("infer --prompt a --explain -q", 2, "-q: does not go with --explain, of which it leaves nothing to be seen; give"),
    ("infer --prompt a --live --json", 2, "--live does not go with --json; give one of them"),
    *(
        (line, 1, "~nobody-here/x: there is no home folder of ~nobody-here on this machine; write the path in full")
        for line in (
            "chunk ~nobody-here/x",
            "chunk . --encrypt ~nobody-here/x",
            "list --store ~nobody-here/x",
            "list --cached --cache-dir ~nobody-here/x",
            "serve --token-file ~nobody-here/x --port 0",
        )
    ),
    (f"bench codec --save {'x' * 300}", 1, "(--save) cannot be written: File name too long; name another file"),
    (f"infer my-model --prompts store/surfw.json --output {'x' * 300}", 1, "cannot be written to xxx"),
    ("infer --prompt a --live half", 2, "--live is 'half', expected full, or nothing; a name or a prompt goes before"),
    ("infer --live half --prompt a", 2, "--live is 'half', expected full, or nothing; a name or a prompt goes before"),
    ("serve --live=half", 2, "Error: --live is 'half', expected full, or nothing"),
    ("infer --live my-model a b", 2, "Got unexpected extra argument(s) (b)"),
    ("infer --prompt a --cache-layers 2 --memory-budget 2GB", 2, "--memory-budget: does not go with --cache-layers"),
    (
        "infer second a --cache-dir x",
        2,
        "--cache-dir is the folder of a disk cache, and this run has none; add --disk-cache SIZE, such as 20GB, or",
    ),
    ("infer second a --cache-dir x --offline --model x", 2, "--model does not go with MODEL 'second'"),
    ("infer --prompt a --memory-budget 2", 2, "--memory-budget is 2, which is 2 bytes; did you mean 2GB?"),
    ("infer --prompt a --memory-budget 500", 2, "--memory-budget is 500, which is 500 bytes; did you mean 500MB?"),
    ("infer --prompt a --memory-budget much", 2, "--memory-budget is 'much', expected a size such as 1.2GB"),
    ("bench infer ./m --memory-budget 2", 2, "--memory-budget is 2, which is 2 bytes; did you mean 2GB?"),
    ("bench infer ./m --cap much", 2, "--cap is 'much', expected a size such as 1.2GB"),
    ("infer --prompt a --dtype bfloat61", 2, "--dtype is 'bfloat61', expected one of float32, fp32"),
    ("chunk ./nowhere --dtype bfloat61", 2, "--dtype is 'bfloat61', expected one of float32, fp32"),
    ("infer --prompt a --temperature -1", 2, "Invalid value for '--temperature': '-1' is not a number >= 0"),
    ("infer --prompt-ids 1,x", 2, "'1,x' is not a list of ids such as 1,2,3"),
    ("serve --cache-mb 5", 2, "Invalid value for '--cache-mb': '5' is not a whole number >= 17"),
    ("serve ./store --store ./store", 2, "--store: does not go with PATH_OR_URL; give one of them"),
    ("infer --prompt a --prompt-lookup x", 2, "Invalid value for '--prompt-lookup': 'x' is not a whole number >= 1"),
    ("serve --cache 5", 2, "No such option: --cache; did you mean --cache-mb?"),
    ("list other", 2, "(other); --store names a store, and 'surfw show NAME' shows one model"),
    ("serve --port http", 2, "Invalid value for '--port': 'http' is not a whole number from 0 to 65535"),
    ("chunk", 2, "name a checkpoint to chunk: a hub id such as org/name, a directory, or a storage URL"),
    ("chunk ''", 2, "name a checkpoint to chunk: a hub id such as org/name, a directory, or a storage URL"),
    ("chunk list", 2, "list is no checkpoint here; did you mean 'surfw list'? For a directory write ./list"),
    ("chunk --list --prune", 2, "--prune: does not go with --list; give one of them"),
    (
        "chunk ./nowhere --codec zip",
        2,
        "codec 'zip' is not known; expected none or lossless or int8 or int4, or several",
    ),
    ("chunk ./nowhere --quantize experts", 2, "says what int8 and int4 take; name one of them with --codec, or leave"),
    ("chunk ./nowhere --quantize most --codec int4", 2, "'most' is not known, expected all or experts"),
    (
        "chunk ./nowhere --codec none --in-place",
        2,
        "--codec: does not go with --in-place, which stores no weights; give one",
    ),
    (
        "chunk second --from ./store --dtype bfloat16",
        2,
        "does not go with --from, as it is for checkpoints; give one of them",
    ),
    ("chunk none --from ./store", 1, "store has no model 'none'; it has: org/first, second"),
    ("infer second a --codec zip", 2, "'zip' is not one of 'auto', 'none', 'lossless'"),
    ("stats --every 5", 2, "--every needs --watch; add it, or leave --every out"),
    ("stats ''", 2, "'' is not the address of a server; expected HOST:PORT or ws://HOST:PORT"),
    ("stats ./store", 2, "'./store' is not the address of a server; expected HOST:PORT or ws://HOST:PORT"),
    # Places and names.
    ("chunk ./nowhere", 1, "./nowhere is not a directory here; give the directory of a checkpoint, or a hub id"),
    ("chunk org/name", 1, "(HF_HUB_OFFLINE is set); check the network and the name, or give a local directory"),
    ("chunk ./model.gguf", 1, "model.gguf is no GGUF file: it does not begin with GGUF; download it again"),
    ("chunk model.safetensors", 1, "model.safetensors is a file of weights, expected the folder of a checkpoint;"),
    ("infer model.safetensors a", 1, "model.safetensors is a file of weights, expected the folder of a checkp"),
    ("infer ./store/surfw.json a", 1, "/store/surfw.json is a file, expected a folder; name the one that is meant"),
    ("list --store model.safetensors", 1, "/model.safetensors is a file, expected a folder; name another"),
    ("serve model.safetensors", 1, "/model.safetensors is a file of weights, expected the folder of a checkpoint"),
    ("infer --prompt a --source ./nowhere", 1, "; name that of a checkpoint, or of a store, which 'surfw chunk MODEL'"),
    ("infer 127.0.0.1:1 a", 1, "no surfw server at ws://127.0.0.1:1: connection refused; start one with 'surfw serve'"),
    ("stats 127.0.0.1:1", 1, "no surfw server at ws://127.0.0.1:1: connection refused; start one with 'surfw serve'"),
    ("infer http://127.0.0.1:1 a", 1, "(connection refused; check the address; a surfw server is started with 'sur"),
    ("infer localhost a", 2, "localhost is a host, and no model's name; a server is HOST:PORT, such as localhost:8765"),
    ("infer ./store a", 1, "/store holds 2 models; choose one with --model: org/first, second"),
    ("infer ./store a --model third", 1, "/store has no model 'third'; it has: org/first, second"),
    ("infer ./plain a", 1, "plain has no tokenizer; give the prompt as token ids (--prompt-ids 1,2,3)"),
    ("infer ./plain --prompt-ids 9", 1, "token id 9 is not in the vocabulary of plain: expected 0 to 8"),
    ("chunk ./nowhere --store model.gguf/x", 1, "a part of this path is a file, expected folders; name another place"),
    ("serve ./nowhere", 1, "; all models of the store are served by 'surfw serve' alone"),
    ("serve 127.0.0.1:8765", 1, "ws://127.0.0.1:8765 is the address of a server, and not a storage; give it to surfw"),
    ("serve --host 0.0.0.0 --port 0", 1, "--insecure"),
    ("rm third", 1, "/store has no model 'third'; it has: org/first, second"),
    ("rm first", 1, "/store has no model 'first'; it has: org/first, second; did you mean org/first?"),
    ("verify org/frist", 1, "/store has no model 'org/frist'; it has: org/first, second; did you mean org/first?"),
    ("show ./second", 1, "has no model './second' (a model's name is wanted here, no path); it has: org/first, second"),
    ("list --store ./nowhere", 1, "/nowhere is not a surfw store yet: nothing was chunked into it; 'surfw chunk MODEL"),
]

VARIABLES = [
    ({"SURFW_MODLE": "a"}, 0, "surfw: warning: SURFW_MODLE is no variable of surfw's; did you mean SURFW_MODEL?"),
    ({"SURFW_MEMORY_BUGDET": "2GB"}, 0, "did you mean SURFW_MEMORY_BUDGET?"),
    ({"SURFW_CACHE_MB": "5"}, 2, "SURFW_CACHE_MB is '5', expected a whole number >= 17"),
    ({"SURFW_MEMORY_BUDGET": "2"}, 2, "SURFW_MEMORY_BUDGET is 2, which is 2 bytes; did you mean 2GB?"),
    ({"SURFW_LIVE": "half"}, 2, "SURFW_LIVE is 'half', expected true, false or full"),
    ({"SURFW_STORAGE_OPTIONS": "a=b"}, 2, "SURFW_STORAGE_OPTIONS is not JSON, expected "),
    ({"SURFW_TOKEN": "a b"}, 2, "SURFW_TOKEN holds no token, expected one word of printable ASCII characters"),
    ({"SURFW_CACHE_LAYERS": "2", "SURFW_MEMORY_BUDGET": "2GB"}, 2, "SURFW_MEMORY_BUDGET exclude each other; give"),
    ({"SURFW_CONFIG": "nowhere.toml"}, 2, "settings file nowhere.toml cannot be read: No such file or directory; name"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose default store has two models, a store without a tokenizer, and two files of weights."""
    home = tmp_path_factory.mktemp("home")
    make_store(home / "store", "org/first", (5000, 6000))
    make_store(home / "store", "second", (7000,), seed=1)
    make_store(home / "plain", "plain", (7000,), files={})
    for name in ("model.safetensors", "model.gguf"):
        (home / name).touch()
    return home


def run(home: Path, line: str, **extra: str) -> "subprocess.CompletedProcess[str]":
    """Run a command line with an empty stdin, in a process that has not imported torch."""
    code = (
        f"import shlex, sys; sys.argv[:] = ['surfw', *shlex.split({line!r})]; from surfw.cli.main import main; main()"
    )
    python = str(Path(SURFW).with_name("python"))
    return warm.run([python, "-c", code], modules=warm.COMMANDS, env=environment(home, **extra), cwd=home)


@pytest.mark.parametrize(("line", "status", "said"), MISTAKES)
def test_a_mistake(line: str, status: int, said: str, home: Path) -> None:
    done = run(home, line)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    last = done.stderr.splitlines()[-1]
    assert said in last
    assert last.startswith("Error: " if status == 2 else "surfw: error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("variables", "status", "said"), VARIABLES)
def test_a_mistake_in_a_variable(variables: dict[str, str], status: int, said: str, home: Path) -> None:
    done = run(home, "config", **variables)
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    assert said in line


def test_a_variable_that_is_like_none_of_surfws_is_left_alone(home: Path) -> None:
    done = run(home, "config", SURFW_DEMO_FOLDER="x", SURFW_TESTS="y")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_for_disk_caches_may_be_set_for_good(home: Path) -> None:
    done = run(home, "infer second a --model x", SURFW_CACHE_DIR="x")
    assert "--model does not go with MODEL 'second'" in done.stderr


def test_serving_before_anything_was_chunked(tmp_path: Path) -> None:
    done = run(tmp_path, "serve --port 0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"surfw: error: there is no store to serve yet: no folder {tmp_path}/store; make one with 'surfw chunk MODEL', "
        "or name another (surfw serve PATH_OR_URL)\n"
    )
