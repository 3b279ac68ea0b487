"""Shared by all scripts, whatever the data set: how runs are saved, loaded and shown.

From top to bottom: command lines and how a script ends; files and folders of a run, its record; saving and
loading models; denoising of batches and pictures; PSNR and SSIM; training, on several devices too; figures
and GIFs; feature maps; tables.

A fault is a `ModelError`, an `OSError` whose message is one line that names the file and the remedy.
"""

import argparse
import builtins
import contextlib
import csv
import errno
import functools
import hashlib
import importlib
import io
import itertools
import json
import logging
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
logging.getLogger("tensorflow").setLevel(logging.ERROR)  # warns of every new model's first prediction
stderr = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where TensorFlow's libraries greet when they are imported
try:
    import keras

    if not hasattr(keras.ops.image, "ssim"):
        raise ImportError(f"Keras {keras.__version__} is too old: pip install 'keras>=3.15'")
    import h5py
    import imageio.v3 as iio
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except (ImportError, ValueError) as error:  # ValueError: a backend that does not exist
    sys.exit(f"{error}; see requirements.txt and KERAS_BACKEND")
except KeyboardInterrupt:
    sys.exit(130)
finally:
    os.dup2(stderr, 2)

keras.config.set_image_data_format("channels_last")  # whatever ~/.keras/keras.json says
keras.config.set_floatx("float32")
matplotlib.rcParams["text.parse_math"] = False  # names hold dollar signs

HERE = Path(__file__).resolve().parent
FOLDERS = ("models", "weights", "figures", "feature_maps", "logs", "gifs")
PARTS = ("encoder", "decoder", "autoencoder")  # models of a denoiser's run
RESERVED_NAMES = ("sigma", "clean", "noisy", "pixels", "PCA")  # beside runs in tables and figures
NAME_BYTES = 100  # of a run, and of a data set in it: names of files are made of two, of 255 bytes at most
NOT_RECORDED = ("verb", "resume", "out", "data_dir")  # arguments of a call, not of a run
PROGRESS_SECONDS = 10  # between two lines that show how far some work is
GIF_FRAME_MS = 250
BATCH, BATCH_SIDE = 250, 96  # images of up to such a side that are computed at a time, outside training
STRIDE = 4  # of what height and width of a model's images must be multiples, in pixels
REACH, DRAWS_REACH = 80, 128  # how far around a cell of STRIDE x STRIDE pixels results and draws look
TILE, DRAWS_TILE = 1024, 512  # sides in pixels: a few hundred megabytes, with codes and draws too
LARGEST_PIXEL = 10  # of a picture of floats: strong noise, but not on the 0-255 scale
DRAWS_SEED = 2  # of draws; (0, 0, 0) would be the stream of 0, the seed of test noise


class ModelError(OSError):
    """A model, weights or record file that is missing, damaged or does not fit; names file and remedy."""


def add_run_options(parser):
    """Add --name, --seed, --limit and --out."""
    add = parser.add_argument
    add("--name", type=run_name, help="name of the run (default: from the data set)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all that the run draws but test noise")
    add("--limit", type=number(int, 1), help="use the first LIMIT training images only")
    add("--out", type=Path, default=HERE, help="where models/, weights/ and so on are written")


def add_training_options(parser, epochs, batch_size):
    """Add the options that every training script spells alike; `epochs` and `batch_size` are its defaults."""
    add_run_options(parser)
    add = parser.add_argument
    add("--epochs", type=number(int, 0), default=epochs, help="passes over the training images")
    add("--batch-size", type=number(int, 1), default=batch_size, help="images in a training step")
    add_precision_option(parser)
    add("--start", type=run_name, metavar="NAME", help="saved run whose weights to begin with")
    add("--resume", action="store_true", help="go on with an interrupted run, with the arguments it has")


def add_precision_option(parser):
    """Add the option for the arithmetic that a verb computes in; None stands for `fast_precision`."""
    choices = ("float32", "mixed_bfloat16")
    parser.add_argument("--precision", choices=choices, help="arithmetic (default: what is fastest here)")


def add_saved_run_options(parser, default="from the data set"):
    """Add the options for the saved run that a verb works on."""
    parser.add_argument("--name", type=run_name, help=f"saved run (default: {default})")
    parser.add_argument("--out", type=Path, default=HERE, help="where models/, weights/ and logs/ are")


def parse_resumable(parser, train_parser, argv, default_name):
    """Parse a command line; a training that is resumed has the arguments that it was started with.

    Processes that are to train together join here, before anything is computed. `default_name` is a function
    of the arguments that names a run without --name.
    """
    args = parser.parse_args(argv)
    args.name = args.name or default_name(args)
    stored = {}
    if args.verb == "train":
        join_processes()
        stored = gathered(resumed_arguments(args) if args.resume and is_first() else {})[0]
        train_parser.set_defaults(**stored)
        args = parser.parse_args([*argv, "--name", args.name])
    if "precision" in args:
        args.precision = args.precision or fast_precision()
    check_same_settings({"resume": getattr(args, "resume", False)} | recorded_arguments(args))
    for key, value in stored.items():
        other_epochs = "epochs" in key and value  # a stage that was left out stays so
        if getattr(args, key) != value and key not in ("data_dir", "learning_rate") and not other_epochs:
            remedy = "--resume takes other epochs and another --learning-rate only"
            raise ModelError(f"--{key.replace('_', '-')}: the interrupted run has {value}; {remedy}")
    return args


def resumed_arguments(args):
    """Arguments that an interrupted run was started with, but for those of the command that resumes it."""
    path = training_folder(args.out, args.name) / "arguments.json"
    if not path.exists():
        raise ModelError(f"{path}: not found, nothing to resume; train without --resume")
    stored = _read_json(path, f"delete {path.parent} and train without --resume")
    script, own = stored.pop("script", "another script"), ("verb", "out", "resume")
    arguments = {key: value for key, value in stored.items() if key not in ("data", *own)}
    if arguments.keys() != vars(args).keys() - set(own):
        raise ModelError(f"--resume: {args.name} is a run of {script}, or of an older one; resume it there")
    return arguments


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds its default to the help of an option that has one."""

    def _get_help_string(self, action):
        has_none = action.default is None or action.default is False
        return action.help if has_none else super()._get_help_string(action)


def verb_parser(argv, description):
    """Parser of a script that knows verbs, of which `train` is meant where none is given.

    Returns arguments that begin with a verb, the parser, and a function of name and help that adds a verb.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv.insert(0, "train")
    epilog = "Without a verb, train is meant; its options: train --help"
    parser = argparse.ArgumentParser(description=description.partition("\n")[0], epilog=epilog)
    add_parser = parser.add_subparsers(dest="verb", required=True).add_parser
    return argv, parser, functools.partial(add_parser, formatter_class=HelpFormatter)


def number(kind, low, high=10**9):
    """Parser of a command-line number, int or float, from `low` to `high`; refuses NaN."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number
    return parse


def run_name(text):
    """Check the name of a run: letters, digits, `_` and `-`; it becomes part of file names and commands."""
    if text in RESERVED_NAMES or text.split("_")[0] in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} has a meaning of its own; choose another")
    if not re.fullmatch(r"\w[\w-]*", text) or len(os.fsencode(text)) > NAME_BYTES:
        rule = f"use letters, digits, _ and, but not first, -; {NAME_BYTES} bytes at most"
        raise argparse.ArgumentTypeError(f"{text!r} cannot be part of names of files; {rule}")
    return text


def progress(total, label):
    """Function to call with how much more is done: prints a line every ten seconds."""
    done, printed = 0, time.monotonic()

    def advance(count=1):
        nonlocal done, printed
        done += count
        if done < total and time.monotonic() - printed >= PROGRESS_SECONDS:
            print(f"{label}: {done:,} of {total:,}", flush=True)
            printed = time.monotonic()

    return advance


def gpus():
    """Name and major compute capability, such as 8, of the GPUs that the backend computes on."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        found = [device for device in jax.local_devices() if device.platform == "gpu"]
        return [(gpu.device_kind, int(re.search(r"\d+", gpu.compute_capability)[0])) for gpu in found]
    if backend == "tensorflow":
        from tensorflow import config

        found = map(config.experimental.get_device_details, config.list_physical_devices("GPU"))
        return [(gpu.get("device_name", "GPU"), gpu.get("compute_capability", (0,))[0]) for gpu in found]
    if backend == "torch":
        from torch import cuda

        found = range(cuda.device_count())
        return [(cuda.get_device_name(gpu), cuda.get_device_capability(gpu)[0]) for gpu in found]
    return []


def fast_precision():
    """`mixed_bfloat16` if the GPUs (NVIDIA's since Ampere) or, without one, the CPU compute in it."""
    capabilities = [capability for _, capability in gpus()]
    is_fast = re.search(r"\bavx512_bf16\b|\bamx_bf16\b", _cpu_details())
    if capabilities:
        is_fast = min(capabilities) >= 8
    return "mixed_bfloat16" if is_fast else "float32"


def _cpu_details():
    path = Path("/proc/cpuinfo")  # of Linux
    return path.read_text() if path.exists() else ""


def run_script(main):
    """Call `main()` and end the process, as every script does that reads or writes runs.

    Exit code 0 when done, 1 after a failure that one line on stderr says, 130 after Ctrl-C or SIGTERM; wrong
    usage ends in 2 by argparse. Anything else is a bug and keeps its traceback. In a notebook, whose kernel
    goes on, every fault is an exception.
    """
    if hasattr(builtins, "__IPYTHON__"):
        main()
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files hold what a terminal may not
    try:
        main()
        sys.stdout.flush()
        return
    except KeyboardInterrupt as stopped:
        code, line = 130, f"\n{str(stopped) or 'Stopped.'}\n"
    except BrokenPipeError:  # the reader of our output has gone, as in `| head -1`
        code, line = 1, ""
    except OSError as error:
        code, line = 1, f"{error_line(error)}\n"
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        code, line = 1, f"Not enough memory ({first_line(error)}); choose smaller numbers or pictures\n"
    print(line, file=sys.stderr, end="", flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # TensorFlow's feeding threads can abort a process that shuts down amid `fit`


def _is_out_of_memory(error):
    return re.search("MemoryError|ResourceExhausted|RESOURCE_EXHAUSTED|OutOfMemory", repr(error))


def error_line(error):
    """What an `OSError` says, in one line."""
    line = " ".join(str(error).split())
    # NumPy gives no number, but says how many items were "requested and" how many written
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or "requested and" in line:
        line += "; free some space and run again"
    return line


def first_line(error):
    """What an exception says, cut to one short line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


@contextlib.contextmanager
def atomic(path):
    """Give a temporary path in the folder of `path` and rename it to `path` if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the ending stays, since writers choose the format by it
    temporary = path.with_name(f".unfinished-{os.urandom(8).hex()}{path.suffix}")
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _to_disk(path):
    """Wait until a file would outlast a power cut."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def publishing(out, name):
    """Collect the files of a run in a folder to write to as if it were `out`; move them there at the end.

    If the block fails, nothing of `out` has changed. The record is moved last: if the process is killed amid
    the moves, files that do not fit the old record are refused until the same command, for a training with
    --resume, has published the run anew. Of processes that have trained together, the first alone goes on.
    """
    _disconnect()
    if not is_first():
        sys.exit()
    draft = Path(out) / "logs" / f".{name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    for folder in FOLDERS:
        (draft / folder).mkdir(parents=True)
    try:
        yield draft
        files = [path for path in draft.rglob("*") if path.is_file()]
        for path in files:
            _to_disk(path)
        record = draft / "logs" / f"{name}.json"
        for path in sorted(files, key=lambda path: path == record):
            target = Path(out) / path.relative_to(draft)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@functools.cache
def training_folder(out, name):
    """Working folder of a training, removed when it ends well; a temporary one but for the first process."""
    return (Path(out) if is_first() else Path(tempfile.mkdtemp())) / "logs" / f"{name}.training"


@contextlib.contextmanager
def training(script, args, checksums, part=None):
    """Prepare a training run: working folder, precision, seed. Say how to resume it when it is stopped.

    `script` is the `__file__` of the caller, `checksums` are those of the data, `part` is one of PARTS that
    the run will write, None where it will write a single model.
    """
    out, folder = Path(args.out), training_folder(args.out, args.name)
    model = f"models/{part}_{args.name}.json" if part else f"models/{args.name}.json"
    files = read_record(out, args.name).get("files")
    if files and model not in files:
        raise ModelError(f"{out}/logs/{args.name}.json: of a run of another kind; choose another --name")
    if files:
        print(f"When it has ended, this run replaces the files of {args.name}; --name keeps both.")
    keras.utils.set_random_seed(args.seed)
    keras.config.set_dtype_policy(args.precision)
    command = [sys.executable, script, "--resume", "--name", args.name]
    command += [] if out == HERE else ["--out", str(out.resolve())]
    arguments = folder / "arguments.json"
    if arguments.exists() and not args.resume:
        found = "of a run that was interrupted, or is going on"
        raise ModelError(f"{folder}: {found}; go on with --resume, delete it, or choose another --name")
    if args.resume and is_first() and _read_json(arguments, "delete it").get("data") != checksums:
        print("The pictures have changed since the run was interrupted, and perhaps their splits.")
    with atomic(arguments) as temporary:
        kept = {"script": Path(script).name, "data": checksums} | vars(args)
        temporary.write_text(json.dumps(kept, default=str), encoding="utf-8")
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Stopped. Go on with: {shlex.join(command)}") from None
    except Exception:
        if not any(folder.rglob("checkpoint.*")):  # nothing to go on with
            shutil.rmtree(folder)
        raise
    finally:
        if not is_first():
            shutil.rmtree(folder.parents[1])
    shutil.rmtree(folder)


def sha256_of(path):
    """SHA-256 of a file as a hexadecimal string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path, remedy):
    """Read a JSON file that holds a dict."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: damaged; {remedy}")
    return content


def read_record(out, name):
    """Read the run record `logs/NAME.json`; an empty dict if there is none."""
    path = Path(out) / "logs" / f"{name}.json"
    return _read_json(path, f"delete it, or train {name} again") if path.exists() else {}


def write_record(draft, name, record):
    """Write `record` to `logs/NAME.json` in a run's `draft`, with the SHA-256 of its models and weights."""
    files = [path for folder in ("models", "weights") for path in sorted((draft / folder).iterdir())]
    checksums = {path.relative_to(draft).as_posix(): sha256_of(path) for path in files}
    record = record | {"files": record.get("files", {}) | checksums}
    text = json.dumps(record, indent=1, default=str, ensure_ascii=False)
    # a name of a folder that is no Unicode becomes an escape of JSON
    path = draft / "logs" / f"{name}.json"
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def describe_run(args, rows):
    """What the record of every training run says, a summary of the run that --start names included."""
    before = read_record(args.out, args.start) if args.start else {}
    summary = ("name", "arguments", "environment", "training_seconds", "epochs", "started_from")
    return {
        "name": args.name,
        "arguments": recorded_arguments(args),
        "environment": environment(),
        "training_seconds": round(sum(row["seconds"] for row in rows)),
        "epochs": len(rows),
        "started_from": {key: before[key] for key in summary if key in before} or None,
    }


def recorded_arguments(args):
    """The arguments of a run for its record: of paths the last part; those of a call are left out."""
    kept = {key: value for key, value in vars(args).items() if key not in NOT_RECORDED}
    return {key: Path(value).name if os.path.isabs(str(value)) else value for key, value in kept.items()}


def size_of_run(record, dataset):
    """The --size that a run was trained with; None if on another data set, or without."""
    same = record.get("data", {}).get("name") == dataset
    return record.get("arguments", {}).get("size") if same else None


def best_row(rows, monitor):
    """Metrics of the best epoch: the lowest loss or CRPS, the highest of another metric; None without any."""
    choose = min if monitor.endswith(("loss", "crps")) else max
    return choose((row for row in rows if monitor in row), key=lambda row: row[monitor], default=None)


def environment():
    """Versions and hardware, for the run record."""
    backend = keras.backend.backend()
    model = re.search(r"model name\s*:\s*(.+)", _cpu_details())
    hardware = [name for name, _ in gpus()] + [model[1] if model else platform.machine()]
    return {
        "python": platform.python_version(),
        "keras": keras.__version__,
        "backend": f"{backend} {importlib.import_module(backend).__version__}",
        "numpy": np.__version__,
        "hardware": f"{'; '.join(hardware)}, {os.cpu_count()} cores",
    }


# What newer Keras writes and older Keras 3 refuses; with these values, its defaults, it does nothing.
_NEW_KEYS = dict.fromkeys(("input_axes", "output_axes", "quantization_config", "renorm_clipping"))
_NEW_KEYS |= {"renorm": False, "renorm_momentum": 0.99}


def _portable(config):
    if isinstance(config, list):
        return [_portable(item) for item in config]
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "DTypePolicy":
        return config | {"config": {"name": "float32"}}
    return {key: _portable(value) for key, value in config.items() if (key, value) not in _NEW_KEYS.items()}


def portable_json(model):
    """Architecture of `model` as JSON that every backend and older Keras 3 load: float32, no new keys."""
    config = json.loads(model.to_json())
    config.pop("compile_config", None)  # may name classes of ours
    return json.dumps(_portable(config), indent=1)


def portable_copy(model):
    """Uncompiled float32 copy of a functional model of stock layers, its weights rounded to what is saved."""
    copy = keras.models.model_from_json(portable_json(model))
    copy.set_weights([_as_float16(weight) for weight in model.get_weights()])
    return copy


def _as_float16(weight):
    """A weight as float16, unless that cannot hold it: half the file, for rounding that shows nowhere."""
    fits = np.abs(weight).max(initial=0) < np.finfo(np.float16).max
    return weight.astype(np.float16 if fits else np.float32)


class _WeightsInMemory(io.BytesIO):
    """The weights file of a model, since HDF5 may crash the process where it cannot write to a disk."""

    def __init__(self, model):
        super().__init__()
        model.save_weights(self)

    def __str__(self):
        return "memory.weights.h5"  # Keras looks at the ending


def save_model(draft, model, name):
    """Write `models/NAME.json` and `weights/NAME.weights.h5` of a functional model of stock layers."""
    copy = portable_copy(model)
    (draft / "models" / f"{name}.json").write_text(portable_json(copy) + "\n", encoding="utf-8")
    memory = io.BytesIO()
    with h5py.File(_WeightsInMemory(copy)) as full, h5py.File(memory, "w") as small:

        def add(path, item):
            if isinstance(item, h5py.Dataset):
                weight = _as_float16(item[()])
                packed = {"compression": "gzip", "shuffle": True, "chunks": weight.shape}
                small.create_dataset(path, data=weight, **packed if weight.size > 1000 else {})
            else:
                small.require_group(path).attrs.update(item.attrs)

        full.visititems(add)
    (draft / "weights" / f"{name}.weights.h5").write_bytes(memory.getbuffer())


def saved_runs(out, part=None):
    """Sorted names of the runs that have saved this part or, without `part`, a single model."""
    names = sorted(path.stem for path in Path(out).glob("models/*.json"))
    if part:
        return [name.removeprefix(f"{part}_") for name in names if name.startswith(f"{part}_")]
    return [name for name in names if name.split("_")[0] not in PARTS]


def denoiser_runs(out, dataset, part):
    """Names of a data set's denoisers by default, `simple_DATASET` and `stacked_DATASET`, that are saved."""
    saved = saved_runs(out, part)
    return [run for run in (f"simple_{dataset}", f"stacked_{dataset}") if run in saved]


def load_model(out, run, part=None, precision="float32"):
    """Load a saved model, and check that its files are those that the run record names.

    Args:
        out: Folder that holds `models/`, `weights/` and `logs/`.
        run: Name of the run.
        part: One of PARTS; None where the run has one model (a classifier).
        precision: Arithmetic of the uncompiled model, `float32` or `mixed_bfloat16`; it gives float32.
    """
    out, name = Path(out), f"{part}_{run}" if part else run
    architecture, weights = out / "models" / f"{name}.json", out / "weights" / f"{name}.weights.h5"
    if not architecture.exists():
        there = ", ".join(saved_runs(out, part)) or "no trained model yet"
        raise ModelError(f"{architecture}: not found; there is {there}")
    checksums = read_record(out, run).get("files", {})
    for path in (architecture, weights):
        if not path.exists():
            raise ModelError(f"{path}: not found; restore it or train {run} again")
        expected = checksums.get(path.relative_to(out).as_posix())
        if expected and sha256_of(path) != expected:
            found = f"not the file that {run} wrote (SHA-256 differs)"
            raise ModelError(f"{path}: {found}; restore it or train again")
    try:
        config = _in_precision(json.loads(architecture.read_text(encoding="utf-8")), precision)
        model = keras.models.model_from_json(json.dumps(config))
        shapes = model.input_shape, model.output_shape
    except Exception as error:  # Keras raises whatever its parsing stumbles over
        raise ModelError(f"{architecture}: not a Keras model ({first_line(error)}); restore it") from None
    takes, gives = (shape == (None, None, None, 3) for shape in shapes)
    if part and not {"encoder": takes, "decoder": gives, "autoencoder": takes and gives}[part]:
        raise ModelError(f"{architecture}: no {part} of pictures of any size; restore it or train again")
    _load_weights(model, weights, f"not the weights of {architecture}", "restore it")
    return model


def _load_weights(model, path, fault, remedy):
    """Load a weights file into a model that it should fit."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of every layer of another model
            model.load_weights(path)
    except Exception as error:  # Keras and HDF5 raise whatever they stumble over
        if _is_out_of_memory(error):
            raise
        raise ModelError(f"{path}: {fault} ({first_line(error)}); {remedy}") from None


def _in_precision(config, precision):
    """Architecture whose layers compute in a precision; those that give outputs stay float32."""
    parts = config["config"]
    outputs = {item for item in keras.tree.flatten(parts["output_layers"]) if isinstance(item, str)}
    for layer in parts["layers"]:
        if "layers" in layer["config"]:
            _in_precision(layer, precision)
        elif layer["class_name"] != "InputLayer" and layer["config"]["name"] not in outputs:
            layer["config"]["dtype"] = precision
    return config


def start_from(model, out, run, part=None):
    """Set the weights of a model to those of a saved one, named as for `load_model`, to go on from there."""
    saved = load_model(out, run, part)
    try:
        model.set_weights(saved.get_weights())
    except ValueError:
        fault = "of another architecture than is to be trained"
        raise ModelError(f"{run}: {fault}; choose another --start") from None


def load_run(out, run):
    """Autoencoder, encoder and decoder of a denoiser's run; the last two tell `denoise_picture` the error."""
    return [load_model(out, run, part) for part in ("autoencoder", "encoder", "decoder")]


def batch_size_for(images, count=BATCH, side=BATCH_SIDE):
    """How many images (N, H, W, 3) to compute at a time: `count` of up to this side, of larger ones fewer."""
    return max(1, min(count, count * side**2 // math.prod(images.shape[1:3])))


def pad_to_stride(images):
    """Images (N, H, W, C), mirrored at the bottom and the right up to multiples of STRIDE."""
    height, width = images.shape[1:3]
    return np.pad(images, ((0, 0), (0, -height % STRIDE), (0, -width % STRIDE), (0, 0)), mode="symmetric")


def denoise(model, noisy):
    """Denoise a batch of images of any size by a saved `autoencoder`, as the protocol measures it.

    Takes a float32 array (N, H, W, 3), nominally in [0, 1]; returns uint8 (N, H, W, 3), clipped and rounded.
    """
    height, width = noisy.shape[1:3]
    padded = pad_to_stride(noisy)
    denoised = model.predict(padded, batch_size=batch_size_for(padded), verbose=0)
    return to_uint8(denoised[:, :height, :width])


def tiles(length, tile, reach):
    """Cut a side of a picture, in pixels, into tiles, each computed from a window that reaches beyond it.

    Windows are all of one size, since every further shape of input costs TensorFlow time and memory; they
    reach a multiple of STRIDE beyond. At the ends of the side a tile may be `reach` longer.

    Yields:
        Slices: the window in the picture, its tile in the window, and the tile in the picture. The last
        window may end up to STRIDE - 1 pixels beyond the picture.
    """
    count = max(1, math.ceil((length - 2 * reach) / tile))
    size = math.ceil((length + 2 * reach * (count - 1)) / count / STRIDE) * STRIDE
    last = math.ceil((length - size) / STRIDE) * STRIDE
    starts = [min(index * (size - 2 * reach), last) for index in range(count)]
    bounds = [0, *(start + reach for start in starts[1:]), length]
    for start, (first, end) in zip(starts, itertools.pairwise(bounds), strict=True):
        yield slice(start, start + size), slice(first - start, end - start), slice(first, end)


def self_ensemble(model, images, positions):
    """Mean of what a saved `autoencoder` makes of images in several positions, each turned back.

    Images are float32 (N, H, W, 3), H and W multiples of STRIDE. Positions are 1, as they are; 2, and
    mirrored left to right; 4, and both mirrored top to bottom; 8, and all of these transposed. (Timofte,
    Rothe, Van Gool, "Seven Ways to Improve Example-Based Single Image Super Resolution", CVPR 2016.)
    """
    total = np.zeros_like(images)
    for transposed, mirrored in list(itertools.product((False, True), ((), 2, 1, (1, 2))))[:positions]:
        turned = np.flip(images, mirrored)
        output = np.asarray(model.predict_on_batch(turned.swapaxes(1, 2) if transposed else turned))
        total += np.flip(output.swapaxes(1, 2) if transposed else output, mirrored)
    return total / positions


def denoise_picture(autoencoder, picture, strength=1.0, posterior=None, samples=8, ensemble=1):
    """Denoise a picture of any size as it is, without adding noise, in tiles, so that memory is bounded.

    A tile is computed with as much of its surroundings as the model's receptive field reaches: the result is
    that of the whole picture but for rounding. What is no such picture is a ValueError.

    Args:
        autoencoder: Saved model.
        picture: uint8 or uint16 array, or floats nominally in [0, 1]; (H, W, 3), or (H, W, 1) of a grey one.
        strength: From 0, the picture itself, to 1, all of the model's result.
        posterior: Saved encoder and decoder of the same run, if the error to expect is wanted.
        samples: Draws of the code that tell it.
        ensemble: In how many positions the picture is denoised, 1, 2, 4 or 8, as for `self_ensemble`.

    Returns:
        Array like `picture`; and the error to expect at each pixel, float16 (H, W) in grey levels of 0-255:
        the root of the mean square of what draws differ from the result. None without `posterior`. With
        several positions it is some percent too large, since the draws are of one.
    """
    shape, kind = picture.shape, picture.dtype.name
    is_integer, channels = picture.dtype.kind == "u", shape[-1]
    is_picture = len(shape) == 3 and channels in (1, 3) and picture.size > 0
    if not is_picture or kind not in ("uint8", "uint16", "float16", "float32", "float64"):
        expected = "(H, W, 3) or (H, W, 1), uint8, uint16 or floats"
        raise ValueError(f"picture: expected is {expected}, not {shape}, {kind}")
    if not is_integer and not np.abs(picture).max() < LARGEST_PIXEL:  # NaN compares as False
        found = f"{picture.min():g} to {picture.max():g}"
        raise ValueError(f"picture: expected are floats, nominally 0 to 1, not {found}")
    peak = np.float32(np.iinfo(kind).max if is_integer else 1)
    result = np.empty_like(picture)
    errors = np.empty(shape[:2], np.float16) if posterior else None
    tile, reach = (DRAWS_TILE, DRAWS_REACH) if posterior else (TILE, REACH)
    cut = list(itertools.product(*(list(tiles(side, tile, reach)) for side in shape[:2])))
    advance = progress(len(cut), "tiles")
    for rows, columns in cut:
        window, inside, target = zip(rows, columns, strict=True)
        noisy = pad_to_stride(picture[window][None] / peak).astype(np.float32).repeat(3 // channels, axis=3)
        before = picture[target] / peak
        denoised = _visible(self_ensemble(autoencoder, noisy, ensemble), inside, channels)
        after = before + strength * (denoised - before)
        result[target] = np.round(peak * after) if is_integer else after
        if posterior:
            encoder, decoder = posterior
            codes = code_pairs(encoder.predict_on_batch(noisy))
            drawn = draws(decoder, codes, samples, (DRAWS_SEED, *(span.start for span in window)))
            squares = sum(np.square(_visible(draw, inside, channels) - after) for draw in drawn)
            errors[target] = 255 * np.sqrt(squares.mean(axis=2) / samples)
        advance()
    return result, errors


def _visible(images, inside, channels):
    """The tile, clipped, of what a model returned for its window (1, H, W, 3); of a grey picture the mean."""
    part = np.asarray(images)[0][inside]
    if not np.isfinite(part).all():
        raise ModelError("the result is not finite; restore the model's weights, or train it again")
    return np.clip(part if channels == 3 else part.mean(axis=2, keepdims=True), 0, 1)


def code_pairs(outputs):
    """Codes as (mean, log-variance), from the flat list of an encoder's outputs."""
    return list(zip(outputs[::2], outputs[1::2], strict=True))


def level_means(outputs):
    """Means of the levels' z among an encoder's outputs; as many detail codes come after them."""
    means = outputs[::2]
    return means[: max(1, len(means) // 2)]


def decode(decoder, z):
    """Call a decoder with a list of codes; a single one, Keras wants without a list."""
    return decoder(z if len(z) > 1 else z[0])


def draws(decoder, codes, samples, seed):
    """Decode draws of the posterior q(z|x), float32 (N, H, W, 3), one after another.

    Codes are (mean, log-variance) of each, arrays (N, h, w, c); the seed is of `numpy.random.default_rng`.
    """
    rng = np.random.default_rng(seed)
    for _ in range(samples):
        z = []
        for mean, log_var in codes:
            z.append(mean + np.exp(log_var / 2) * rng.standard_normal(mean.shape, np.float32))
        yield decoder.predict_on_batch(z)


def to_uint8(images):
    """Clip images to [0, 1], scale them to 255 and round them to uint8."""
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def to_float(images):
    """uint8 images as float32 in [0, 1]; arrays of floats as float32, their values unchanged."""
    return images / np.float32(255) if images.dtype == np.uint8 else images.astype(np.float32)


def psnr(clean, denoised):
    """Peak signal-to-noise ratio of each image in dB, peak 255, over all its pixels and channels.

    Takes uint8 arrays (N, H, W, C); returns float64 (N,), infinite where the images are equal.
    """
    error = np.square(clean.astype(np.float32) - denoised.astype(np.float32))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error.mean(axis=(1, 2, 3), dtype=np.float64))


def psnr_captions(clean, denoised):
    """PSNR of each image as a caption for `rows_figure`; None where no clean images are known."""
    return None if clean is None else [f"{value:.1f} dB" for value in psnr(clean, denoised)]


def ssim(clean, denoised):
    """Structural similarity of each image (Wang et al. 2004): Gaussian window 11, sigma 1.5, data range 255.

    Takes uint8 arrays (N, H, W, C), H and W at least 11; returns float32 (N,), means over channels.
    """
    pairs = (clean.astype(np.float32), denoised.astype(np.float32))
    return keras.ops.convert_to_numpy(keras.ops.image.ssim(*pairs, max_val=255.0))


class ConvolutionMuon(keras.optimizers.Muon):
    """Muon for 3x3 convolutions, each kernel taken as a matrix (9 * in, out); the rest is left to AdamW.

    Keras leaves all convolutions to AdamW. Jordan et al., "Muon: An optimizer for hidden layers in neural
    networks", 2024; the length of a step is by default that of Liu et al., "Muon is Scalable for LLM
    Training", 2025: 0.2 times the learning rate per weight, about that of Adam.
    """

    def _should_use_adamw(self, variable):
        return len(variable.shape) != 4 or variable.shape[:2] != (3, 3)

    def zeropower_via_newtonschulz5(self, x, steps):
        matrix = super().zeropower_via_newtonschulz5(keras.ops.reshape(x, (-1, x.shape[-1])), steps)
        return keras.ops.reshape(matrix, x.shape)

    def lr_adjust(self, x):
        return keras.ops.reshape(super().lr_adjust(keras.ops.reshape(x, (-1, x.shape[-1]))), x.shape)


class Checkpoint(keras.callbacks.Callback):
    """Keep, after every epoch, all that is needed to go on, and the best weights so far.

    Does the work of `BackupAndRestore`, `ModelCheckpoint` and `CSVLogger`, but atomically: weights,
    optimizer, epoch and history are one file that is replaced at once, so that no kill can leave them apart
    and the best value of `monitor` is not forgotten.
    """

    def __init__(self, folder, monitor):
        super().__init__()
        self.folder, self.monitor = Path(folder), monitor
        self.path, self.best_path = self.folder / "checkpoint.weights.h5", self.folder / "best.weights.h5"
        self.remedy = f"delete {self.folder} to train this stage anew"
        self.rows = []

    def restore(self):
        """Load the checkpoint, if there is one, into the compiled model; return the number of epochs done."""
        if not self.path.exists():
            return 0
        try:
            with h5py.File(self.path) as file:
                rows = json.loads(file["history"].asstr()[()])
        except (OSError, KeyError, ValueError):
            raise ModelError(f"{self.path}: damaged checkpoint; {self.remedy}") from None
        self.load(self.path)
        self.rows = rows
        return len(rows)

    def load(self, path):
        """Load one of the two weights files into the model."""
        _load_weights(self.model, path, "does not fit this model", self.remedy)

    def save(self, path):
        """Write the model's weights, in full precision, and the history."""
        memory = _WeightsInMemory(self.model)
        with h5py.File(memory, "a") as file:
            file["history"] = json.dumps(self.rows)
        with atomic(path) as temporary:
            temporary.write_bytes(memory.getbuffer())

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.monotonic()

    def on_test_end(self, logs=None):
        value = float(logs[self.monitor.removeprefix("val_")])
        if not np.isfinite(value):  # before anything is made of this epoch's weights
            raise FloatingPointError(f"{self.monitor} is {value} after epoch {len(self.rows) + 1}")

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1} | {key: float(value) for key, value in logs.items()}
        row["seconds"] = round(time.monotonic() - self._started, 1)
        row["hardware"] = environment()["hardware"]  # a run may be resumed on another machine
        self.rows.append(row)
        if best_row(self.rows, self.monitor) is row:
            self.save(self.best_path)
        self.save(self.path)
        write_csv(self.folder / "epochs.csv", self.rows)


def processes():
    """Rank of this process, 0 of the first one, and how many train together."""
    if keras.backend.backend() != "jax":
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def is_first():
    """Whether this process is alone, or the first of those that train together: the one that writes."""
    return processes()[0] == 0


def join_processes():
    """Join the processes that train together, if Keras' environment variables say that there are several.

    Each computes its part of every batch; the first one alone writes and prints. Comes before any computing.
    """
    if "KERAS_DISTRIBUTION_NUM_PROCESSES" not in os.environ:
        return
    if keras.backend.backend() != "jax":
        raise ModelError("KERAS_DISTRIBUTION_NUM_PROCESSES: processes can join under KERAS_BACKEND=jax only")
    keras.utils.set_random_seed(0)  # Keras would else agree on one, which `training` sets anyway
    try:
        keras.distribution.initialize()
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"KERAS_DISTRIBUTION_*: the processes cannot join ({first_line(error)})") from None
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # JAX has set its own, which ignores it
    if not is_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _disconnect():
    """Wait until all processes are here; from then on none is aborted because another ends."""
    if processes()[1] > 1:
        import jax

        gathered(None)
        jax.distributed.shutdown()


def gathered(value):
    """What each of the processes has, the first one's first."""
    if processes()[1] == 1:
        return [value]
    from jax.experimental import multihost_utils

    pickled = pickle.dumps(value)
    longest = int(multihost_utils.process_allgather(np.int32(len(pickled))).max())
    padded = np.frombuffer(pickled.ljust(longest), np.uint8)  # all pass arrays of one shape
    return [pickle.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def check_same_settings(settings):
    """Refuse, in all processes, a dict of settings that differ: JAX would hang, or train replicas apart."""
    first, *others = gathered(settings)
    differing = [name for name in first if any(other.get(name) != first[name] for other in others)]
    if differing:
        _disconnect()
        raise ModelError(f"the processes differ in {', '.join(differing)}; start all by the same command")


class _Share(keras.utils.PyDataset):
    """What a process feeds of every batch."""

    def __init__(self, batches, share):
        super().__init__()
        self.batches, self.share = batches, share

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return keras.tree.map_structure(self.share, self.batches[index])


@contextlib.contextmanager
def _on_all_devices(model, batches, validation):
    """Let `model.fit` use all devices that JAX sees, those of processes that have joined among them.

    Each holds all variables and computes a part of every batch (`keras.distribution.DataParallel`), which
    gives the weights that one would give. Yields arguments of `fit`: batches and validation of this process.
    """
    (rank, processes_count), size = processes(), batches.batch_size
    devices = keras.distribution.list_devices() if keras.backend.backend() == "jax" else []
    at_once = batch_size_for(keras.tree.flatten(validation)[0])
    shapes = [(variable.path, variable.shape) for variable in model.variables]
    check_same_settings({"data or batch size": (len(batches), size), "weights": shapes})
    if len(devices) < 2:
        yield {"x": batches, "validation_data": validation, "validation_batch_size": at_once}
        return
    count = len(devices)
    if size % count:
        _disconnect()
        raise ModelError(f"--batch-size {size}: not a multiple of the {count} devices; choose another")
    print(f"Training on {count} devices, {size // count} images of a batch on each.")

    def share(array):
        return np.split(array[: len(array) // count * count], processes_count)[rank]

    parallel = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    values = gathered([np.asarray(variable.value) for variable in variables])[0]
    for variable, value in zip(variables, values, strict=True):
        layout = parallel.get_variable_layout(variable)
        variable.assign(keras.distribution.distribute_tensor(value, layout))
    with parallel.scope():
        yield {
            "x": _Share(batches, share),
            "validation_data": keras.tree.map_structure(share, validation),
            "validation_batch_size": max(1, at_once // count) * count // processes_count,
        }
    for variable in variables:
        variable.assign(np.asarray(variable.value))
    model.make_test_function(force=True)  # which was compiled for all devices


class _StopBetweenBatches(keras.callbacks.Callback):
    """Let Ctrl-C and SIGTERM take effect between two batches: amid one, TensorFlow can abort the process.

    A second one takes effect at once.
    """

    noted = False

    def __enter__(self):
        stopping = (signal.SIGINT, signal.SIGTERM)
        self.previous = {signum: signal.signal(signum, self.note) for signum in stopping}
        return self

    def __exit__(self, *exception):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
        self.stop()  # whatever it came to, as when the other processes have stopped first

    def note(self, signum, frame):
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True

    def stop(self, *_, **__):
        if self.noted:
            raise KeyboardInterrupt

    on_train_batch_end = on_test_batch_end = on_predict_batch_end = on_epoch_end = on_train_end = stop


class _PrintSteps(keras.callbacks.Callback):
    """Print a line now and then within an epoch, where `fit` has no terminal for its bar."""

    def on_train_begin(self, logs=None):
        self.printed = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        if time.monotonic() - self.printed >= 3 * PROGRESS_SECONDS:
            print(f"step {batch + 1:,} of {self.params['steps']:,}, loss {logs['loss']:.4f}", flush=True)
            self.printed = time.monotonic()


def fit(model, batches, validation, epochs, folder, monitor, callbacks=(), stage=""):
    """Train a compiled model, keeping a checkpoint after every epoch; go on from one that is there.

    Args:
        model: Built and compiled model; has the best weights afterwards.
        batches: `load_data.Batches` that feed the training.
        validation: Inputs and targets that are measured after every epoch; on several devices, as many as
            they can share evenly.
        epochs: Passes over the training images, those of the checkpoint included.
        folder: Working folder of the run, `training_folder`.
        monitor: Metric of the validation split that tells the best epoch.
        callbacks: Further callbacks, called before the checkpoint is written.
        stage: Name of this stage, where a training has several.

    Returns:
        The metrics, a dict for each epoch.
    """
    model.optimizer.build(model.trainable_variables)
    checkpoint = Checkpoint(folder / stage, monitor)
    checkpoint.set_model(model)
    done = checkpoint.restore()
    if 0 < done < epochs:
        for later in folder.glob("*/checkpoint.weights.h5"):
            if later.stat().st_mtime > checkpoint.path.stat().st_mtime:  # it began with this stage's weights
                raise ModelError(f"{later}: {later.parent.name} has begun; resume with the epochs of before")
    checkpoint.rows = gathered(checkpoint.rows)[0]
    callbacks = [*callbacks, checkpoint]  # which comes last, when all else of the epoch is on disk
    if not sys.stdout.isatty():
        callbacks.insert(0, _PrintSteps())
    if stage and len(checkpoint.rows) < epochs:
        print(f"Stage {stage}:", flush=True)
    try:
        with _StopBetweenBatches() as stop, _on_all_devices(model, batches, validation) as fed:
            model.fit(
                **fed,
                epochs=epochs,
                initial_epoch=len(checkpoint.rows),
                callbacks=[*callbacks, stop],
                shuffle=False,
                verbose=1 if sys.stdout.isatty() else 2,
            )
    except FloatingPointError as error:
        remedy = "go on from its last good epoch with --resume and a lower --learning-rate"
        raise ModelError(f"{folder}: the training diverged ({error}); {remedy}") from None
    except RuntimeError as error:
        if processes()[1] == 1:
            raise
        remedy = "start all of them again with --resume"
        raise ModelError(f"another process has ended ({first_line(error)}); {remedy}") from None
    if is_first():
        checkpoint.load(checkpoint.best_path)
    model.set_weights(gathered(model.get_weights())[0])
    return checkpoint.rows


def rows_figure(rows, title="", cell=1.35, figure=None, unit=None):
    """Draw rows of images, each with its label at the left and a caption under each image.

    Args:
        rows: List of (label, images, captions). Images are uint8 (N, H, W, 3), or float (N, H, W) for maps in
            false colours on one scale, from 0. Captions are N strings, or None.
        title: Title of the figure.
        cell: Width of an image in inches.
        figure: Part of a figure to draw into; by default a new one, which is returned.
        unit: Of the maps; with it, a bar beside them shows their scale.
    """
    columns = max(len(images) for _, images, _ in rows)
    height = 0.3 if title else 0
    for _, images, captions in rows:
        height += cell * images.shape[1] / images.shape[2] + (0.2 if captions else 0)
    figure = figure or Figure(figsize=(cell * columns + 0.3, height), layout="constrained")
    maps = [images.ravel() for _, images, _ in rows if images.ndim == 3]
    highest = np.quantile(np.concatenate(maps), 0.995) if maps else 1  # a few outliers would darken the rest
    scale = {"cmap": "magma", "vmin": 0, "vmax": highest}  # which pictures in colours do without
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (label, images, captions) in zip(grid, rows, strict=True):
        for axis in axes[len(images) :]:
            axis.set_axis_off()
        for axis, image, caption in zip(axes, images, captions or [""] * len(images), strict=False):
            drawn = axis.imshow(image, **scale)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(caption, fontsize=8)
        axes[0].set_ylabel(label, fontsize=9)
        if unit and images.ndim == 3:
            figure.colorbar(drawn, ax=list(axes), label=unit)
    figure.suptitle(title, fontsize=10)
    return figure


def curves_figure(panels, title="", ticks=None, figure=None):
    """Draw curves in panels, a label in one colour throughout, with the legend below them.

    Panels are a list of (x label, y label, {curve label: (x values, y values)}). They are drawn one below
    another into a given part of a figure, or side by side into a new one, which is returned.
    """
    labels = list(dict.fromkeys(label for _, _, curves in panels for label in curves))
    columns = 2 if figure else min(len(labels), 3 * len(panels))
    grid = (len(panels), 1) if figure else (1, len(panels))
    size = 4.6 * len(panels), 3.4 + 0.2 * math.ceil(len(labels) / columns)
    figure = figure or Figure(figsize=size, layout="constrained")
    lines = {}
    axes = figure.subplots(*grid, squeeze=False).flat
    for axis, (xlabel, ylabel, curves) in zip(axes, panels, strict=True):
        for label, (x, y) in curves.items():
            index = labels.index(label)
            style = "--" if index % 2 else "-"  # so that neighbours which coincide both show
            (lines[label],) = axis.plot(x, y, style, color=f"C{index}", marker=".", zorder=2 + index % 2)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        if ticks:
            axis.set_xticks(ticks)
        axis.grid(alpha=0.3)
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def history_figure(rows, labels, title=""):
    """Draw metrics and their validation twins against the epoch, in a panel each; dotted lines part stages.

    Rows are a dict for each epoch, as `Checkpoint` keeps them; `labels` says what to write at the axis, by
    metric. A metric that has no two epochs is left out; without any the figure is None.
    """
    panels = []
    for name, label in labels.items():
        measured = [row for row in rows if name in row]
        epochs, twins = [row["epoch"] for row in measured], {"training": name, "validation": f"val_{name}"}
        curves = {kind: (epochs, [row[key] for row in measured]) for kind, key in twins.items()}
        if len(epochs) > 1:
            panels.append(("epoch", label, curves))
    if not panels:
        return None
    figure = curves_figure(panels, title)
    for axis in figure.axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
        first, last = axis.get_xlim()
        for before, after in itertools.pairwise(rows):
            if before.get("stage") != after.get("stage") and first < before["epoch"] + 0.5 < last:
                axis.axvline(before["epoch"] + 0.5, color="0.5", linestyle="dotted")
    return figure


def save_figure(figure, path):
    """Write a matplotlib figure as PNG."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)


def save_figures(out, name, figures):
    """Write matplotlib figures by kind as `figures/NAME_KIND.png`; None is nothing to show."""
    for kind, figure in figures.items():
        if figure:
            save_figure(figure, Path(out) / f"figures/{name}_{kind}.png")


def save_gif(figures, path):
    """Write matplotlib figures of one size as frames of an endless GIF; the last one stays longer."""
    frames = []
    for figure in figures:
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(72)
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[..., :3])
    durations = [GIF_FRAME_MS] * (len(frames) - 1) + [6 * GIF_FRAME_MS]
    iio.imwrite(path, np.stack(frames), duration=durations if len(frames) > 1 else GIF_FRAME_MS, loop=0)


def encode(encoder, images):
    """Feature maps (z_mean of the last level), float32 (N, h, w, c), of a batch of images.

    Images (N, H, W, 3) are uint8, or float32 nominally in [0, 1]; H and W are cut to whole cells.
    """
    height, width = (side // STRIDE * STRIDE for side in images.shape[1:3])
    return level_means(encoder.predict_on_batch(to_float(images[:, :height, :width])))[-1]


def write_feature_maps(path, encode, images, labels, attributes):
    """Write an HDF5 file of `features` (N, h, w, c) float16, in chunks, and `labels` (N,).

    `encode` makes feature maps (n, h, w, c) of some of the images (N, H, W, 3); `attributes` say what they
    were made from: run, dataset, split, sigma, pooling.
    """
    count = batch_size_for(images)
    memory = io.BytesIO()  # HDF5 crashes the process when it cannot write to a disk
    with h5py.File(memory, "w") as file:
        file.attrs.update(attributes)
        file["labels"] = labels
        for start in range(0, len(images), count):
            maps = encode(images[start : start + count])
            if not start:
                shape = (len(images), *maps.shape[1:])
                rows = max(1, 2**18 // maps[0].size)  # images in a chunk of half a megabyte
                chunks = (min(rows, len(images)), *maps.shape[1:])
                features = file.create_dataset("features", shape, np.float16, chunks=chunks, fletcher32=True)
            features[start : start + count] = maps
    Path(path).write_bytes(memory.getbuffer())


def write_csv(path, rows):
    """Write a list of dicts as CSV; a key that a row lacks leaves its cell empty."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(itertools.chain(*rows)))
        writer.writeheader()
        writer.writerows(rows)


def format_table(rows):
    """Format a list of dicts with the same keys as a Markdown table; small floats get more digits."""

    def text(value):
        if isinstance(value, float):
            return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"
        return "" if value is None else str(value)

    cells = [list(rows[0])] + [[text(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)
