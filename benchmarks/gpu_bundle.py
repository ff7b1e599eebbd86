"""Collect the wheels that a GPU machine without a network needs for `make gpu`.

    python benchmarks/gpu_bundle.py --output dist/gpu-bundle

Downloads the wheels of gpu_bundle.txt for Python 3.12 on x86-64, and one assembler, ptxas 13.1:
12.8.93 (in triton 3.6's wheel) and 13.0.88 (in CUDA 13.0) are known to miscompile Triton's code for
sm_90a. On the machine, `bash benchmarks/gpu_bundle.sh DIR ...` installs them beside its own
packages and runs benchmarks/gpu.py.
"""

import argparse
import base64
import hashlib
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("gpu_bundle.txt")
NVCC = "nvidia-cuda-nvcc==13.1.80"
GLIBC = ("_2_28", "_2_27", "_2_24", "_2_17", "2014")
PLATFORMS = [f"manylinux{version}_x86_64" for version in GLIBC]
# Bytes; machines without a network take files by hand, and often not more.
LIMIT = 45 << 20


def download(folder: Path, *what: str) -> None:
    """Download wheels without their dependencies, whatever runs here."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    options += ["--python-version=3.12", "--implementation=cp", f"--dest={folder}"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *what], check=True)


def ptxas_wheel(folder: Path) -> Path:
    """Make a wheel that installs bin/ptxas alone: NVIDIA's has the whole compiler, 42 MB."""
    with tempfile.TemporaryDirectory() as temporary:
        download(Path(temporary), NVCC)
        (source,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(source) as archive:
            content = archive.read("nvidia/cu13/bin/ptxas")
            ends = ("license.txt", "license")
            names = [name for name in archive.namelist() if name.lower().endswith(ends)]
            terms = [archive.read(name) for name in names]
    version = NVCC.partition("==")[2]
    name, info = f"ptxas-{version}", f"ptxas-{version}.dist-info"
    tag = "py3-none-manylinux_2_17_x86_64"
    about = {"Metadata-Version": "2.1", "Name": "ptxas", "Version": version}
    about["Summary"] = f"bin/ptxas of {NVCC}"
    wheel = {"Wheel-Version": "1.0", "Generator": "gpu_bundle", "Root-Is-Purelib": "false"}
    files = {
        f"{name}.data/scripts/ptxas": content,
        f"{info}/METADATA": _headers(about),
        f"{info}/WHEEL": _headers({**wheel, "Tag": tag}),
        **({f"{info}/LICENSE": terms[0]} if terms else {}),
    }
    record = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]).encode()
    target = folder / f"{name}-{tag}.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            entry = zipfile.ZipInfo(path)
            # With the bits of a regular file: without them pip does not make it executable.
            mode = 0o755 if path.endswith("/ptxas") else 0o644
            entry.external_attr = (stat.S_IFREG | mode) << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return target


def _headers(values: dict[str, str]) -> bytes:
    return "".join(f"{name}: {value}\n" for name, value in values.items()).encode()


def _digest(data: bytes) -> str:
    """SHA-256 as RECORD has it: in base64 for URLs, without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def bundle(output: Path) -> None:
    """Collect the wheels and list them. The folder appears whole, or not at all."""
    # What is replaced is removed: a bundle that an earlier call made, and nothing else.
    wheels = output.is_dir() and all(path.suffix == ".whl" for path in output.iterdir())
    if output.exists() and not wheels:
        raise SystemExit(f"{output} has other things than wheels: name another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as draft:
        made = Path(draft) / "bundle"
        made.mkdir()
        download(made, "--requirement", str(REQUIREMENTS))
        ptxas_wheel(made)
        size = sum(path.stat().st_size for path in made.iterdir())
        for path in sorted(made.iterdir()):
            print(f"{path.stat().st_size / 2**20:6.1f} MiB  {path.name}")
        if size > LIMIT:
            raise SystemExit(
                f"{size / 2**20:.1f} MiB are more than {LIMIT >> 20}: take a package out of "
                f"{REQUIREMENTS.name}"
            )
        shutil.rmtree(output, ignore_errors=True)
        made.rename(output)
    command = f"bash benchmarks/gpu_bundle.sh {output} --output gpu-results"
    print(f"{size / 2**20:6.1f} MiB in {output}; on the machine: {command}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    output = Path("dist/gpu-bundle")
    what = f"replaced (default: {output})"
    parser.add_argument("--output", type=Path, default=output, metavar="DIR", help=what)
    bundle(parser.parse_args().output)


if __name__ == "__main__":
    main()
