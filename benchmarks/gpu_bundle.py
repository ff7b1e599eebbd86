"""Collect what a bare GPU machine lacks, so that benchmarks/gpu.py runs there without a network: `make gpu-bundle`.

    python benchmarks/gpu_bundle.py --output dist/gpu-bundle

Downloads the wheels of gpu_bundle.txt for Python 3.12 on x86-64, and one assembler: ptxas 13.1,
since 12.8.93 (in triton 3.6's wheel) and 13.0.88 (in CUDA 13.0) are known to miscompile Triton's
code for sm_90a. On the machine, `bash benchmarks/gpu_bundle.sh DIR ...` installs them beside what
is there and runs benchmarks/gpu.py.
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
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
LIMIT = 45 << 20


def download(folder: Path, *what: str) -> None:
    """Wheels without their dependencies."""
    words = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        "3.12",
        "--implementation",
        "cp",
        *words,
        "--dest",
        str(folder),
        *what,
    ]
    subprocess.run(command, check=True)


def ptxas_wheel(folder: Path) -> Path:
    """A wheel that installs nothing but bin/ptxas: NVIDIA's has the whole compiler, 42 MB."""
    with tempfile.TemporaryDirectory() as temporary:
        download(Path(temporary), NVCC)
        (source,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(source) as archive:
            content = archive.read("nvidia/cu13/bin/ptxas")
            terms = [
                archive.read(name)
                for name in archive.namelist()
                if name.lower().endswith(("license.txt", "license"))
            ]
    version = NVCC.partition("==")[2]
    name, info = f"ptxas-{version}", f"ptxas-{version}.dist-info"
    files = {
        f"{name}.data/scripts/ptxas": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: ptxas\nVersion: {version}\nSummary: bin/ptxas of {NVCC}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: gpu_bundle\nRoot-Is-Purelib: false\nTag: py3-none-manylinux_2_17_x86_64\n",
        **({f"{info}/LICENSE": terms[0]} if terms else {}),
    }
    record = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in files.items()] + [
        f"{info}/RECORD,,"
    ]
    target = folder / f"{name}-py3-none-manylinux_2_17_x86_64.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in {**files, f"{info}/RECORD": "\n".join(record).encode()}.items():
            entry = zipfile.ZipInfo(path)
            # With the bits of a regular file: without them pip does not make it executable.
            entry.external_attr = (
                stat.S_IFREG | (0o755 if path.endswith("/ptxas") else 0o644)
            ) << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return target


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("dist/gpu-bundle"),
        metavar="DIR",
        help="default: dist/gpu-bundle; replaced",
    )
    options = parser.parse_args()
    made = options.output.with_name(f"{options.output.name}.tmp")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    download(made, "--requirement", str(REQUIREMENTS))
    ptxas_wheel(made)
    size = sum(path.stat().st_size for path in made.iterdir())
    for path in sorted(made.iterdir()):
        print(f"{path.stat().st_size / 2**20:6.1f} MiB  {path.name}")
    if size > LIMIT:
        raise SystemExit(
            f"{size / 2**20:.1f} MiB are more than {LIMIT >> 20}: a machine without a network may not take them"
        )
    shutil.rmtree(options.output, ignore_errors=True)
    made.rename(options.output)
    print(
        f"{size / 2**20:6.1f} MiB in {options.output}; there: bash benchmarks/gpu_bundle.sh {options.output} --output gpu-results"
    )


if __name__ == "__main__":
    main()
