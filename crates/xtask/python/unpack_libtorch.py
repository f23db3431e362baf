"""Takes what a CPU program needs out of the downloaded wheels.

    python3 unpack_libtorch.py WHEELS PREFIX

Fills PREFIX/include and PREFIX/lib. The torch wheel carries CUDA's libraries too, some 4 GB
unpacked with what they depend on; of those libtorch_cpu.so itself needs only two small ones.
"""

import pathlib
import shutil
import sys
import zipfile

WHEELS, PREFIX = (pathlib.Path(a) for a in sys.argv[1:3])
TORCH = {"libtorch_cpu.so", "libc10.so", "libgomp.so.1"}
CUDA = {"libcudart.so.13", "libcupti.so.13"}


def place(member):
    """Where a file of a wheel goes below PREFIX, or None."""
    name = pathlib.PurePosixPath(member)
    if member.startswith("torch/lib/") and name.name in TORCH:
        return pathlib.Path("lib", name.name)
    if member.startswith("torch/include/"):
        return pathlib.Path(name.relative_to("torch"))
    if member.startswith("nvidia/") and name.name in CUDA:
        return pathlib.Path("lib", name.name)
    return None


for folder in ("include", "lib"):
    shutil.rmtree(PREFIX / folder, ignore_errors=True)
for wheel in sorted(WHEELS.glob("*.whl")):
    with zipfile.ZipFile(wheel) as z:
        for info in z.infolist():
            to = place(info.filename)
            if to is None or info.is_dir():
                continue
            path = PREFIX / to
            path.parent.mkdir(parents=True, exist_ok=True)
            with z.open(info) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            if to.parts[0] == "lib":
                path.chmod(0o755)
missing = sorted(n for n in TORCH | CUDA if not (PREFIX / "lib" / n).is_file())
if missing:
    sys.exit(f"the wheels in {WHEELS} hold no {', '.join(missing)}: they are of another version or "
             "platform than this script knows (Linux on x86-64)")
# torch-sys links with -ltorch. The wheel's own libtorch.so needs libtorch_cuda.so; this linker
# script stands for the two libraries that a CPU program uses.
(PREFIX / "lib" / "libtorch.so").write_text("INPUT(libtorch_cpu.so libc10.so)\n")
(PREFIX / "lib" / "libgomp.so").symlink_to("libgomp.so.1")
