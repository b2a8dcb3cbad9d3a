"""Builds `jrl_kernels._C`: with nvcc when it is found, for the CPU alone when it is not, not at all without a compiler.

Environment: JRL_CUDA=0|1 (never | require), TORCH_CUDA_ARCH_LIST (for example "8.0;9.0a;10.0+PTX"), MAX_JOBS,
CUDA_HOME, CXX. torch is never imported: the extension knows nothing of it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ["8.0", "8.6", "8.9", "9.0a", "10.0+PTX"]
MINIMUM_CAPABILITY = (8, 0)
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# No -ffast-math: results are those of IEEE arithmetic, and only its flags and errno go unwatched.
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
REBUILD = "pip install -e ."


class BuildError(SystemExit):
    """A build that was asked for and cannot be done; printed as one line, without a traceback."""


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def cuda_setting() -> str:
    setting = os.environ.get("JRL_CUDA", "")
    if setting not in ("", "0", "1"):
        raise BuildError(f"jrl: JRL_CUDA: expected 0, 1 or nothing, got {setting!r}")
    return setting


def jobs() -> int:
    text = os.environ.get("MAX_JOBS", "")
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdigit() or int(text) == 0:
        raise BuildError(f"jrl: MAX_JOBS: expected a positive integer, got {text!r}")
    return int(text)


class HostCompiler:
    """The C++ compiler, or the reason why there is none that can build a Python extension."""

    def __init__(self) -> None:
        self.command: list[str] = []
        self.executable = ""  # the command without a compiler cache and flags, for nvcc -ccbin
        self.version = ""
        self.openmp = False
        self.missing: dict[str, str] | None = None
        if sys.platform == "win32":
            self.missing = {
                "reason": "the extension is not built on Windows",
                "fix": "use backend='reference', or build under WSL",
            }
            return
        asked = os.environ.get("CXX", "")
        names = [asked] if asked else ["c++", "g++", "clang++"]
        found = [name for name in names if shutil.which(shlex.split(name)[0])]
        if not found:
            self.missing = {
                "reason": f"no C++ compiler was found (looked for {', '.join(names)})",
                "fix": "install a C++17 compiler (Debian, Ubuntu: apt install g++), then: " + REBUILD,
            }
            return
        self.command = shlex.split(found[0])
        launchers = ("ccache", "sccache")
        self.executable = next(word for word in self.command if Path(word).name not in launchers)
        self.version = run([*self.command, "--version"]).stdout.split("\n")[0].strip()
        include = f"-I{sysconfig.get_paths()['include']}"
        log = self._trial(
            "#include <cstddef>\n#if __cplusplus < 201703L\n#error C++17\n#endif\n", ["-std=c++17"]
        )
        if log is not None:
            self.missing = {
                "reason": f"{found[0]} cannot build a C++17 shared library ({log})",
                "fix": "install or name another compiler with CXX, then: " + REBUILD,
            }
        elif self._trial("#include <Python.h>\n", ["-std=c++17", include]) is not None:
            self.missing = {
                "reason": "the headers of this Python (Python.h) are missing",
                "fix": "install them (Debian, Ubuntu: apt install python3-dev), then: " + REBUILD,
            }
        else:
            threads = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
            self.openmp = self._trial(threads, ["-std=c++17", "-fopenmp"]) is None

    def _trial(self, source: str, flags: list[str]) -> str | None:
        """None when the source builds as a shared library, else the last line of the compiler's complaint."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trial.cpp")
            path.write_text(source)
            command = [
                *self.command,
                *flags,
                "-fPIC",
                *shared_flags(),
                str(path),
                "-o",
                str(Path(folder, "trial.so")),
            ]
            result = run(command)
        if result.returncode == 0:
            return None
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        return lines[0].strip() if lines else f"exit code {result.returncode}"


def shared_flags() -> list[str]:
    return ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]


def parse_architecture(entry: str) -> tuple[tuple[int, int], str, bool]:
    """ "9.0a+PTX" -> ((9, 0), "90a", True)"""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
    if match is None:
        raise BuildError(
            f"jrl: TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 10.0+PTX, got {entry!r}"
        )
    major, minor, suffix, ptx = match.groups()
    return (int(major), int(minor)), f"{major}{minor}{suffix}", ptx is not None


class CudaCompiler:
    """nvcc and the architectures it compiles for, or the reason why CUDA sources are skipped."""

    def __init__(self, sources: list[Path]) -> None:
        self.nvcc = ""
        self.version = ""
        self.architectures: list[str] = []
        self.notes: list[str] = []
        self.skipped: dict[str, str] | None = None
        setting = cuda_setting()
        if setting == "0":
            self.skipped = {"reason": "JRL_CUDA=0 was set", "fix": f"JRL_CUDA=1 {REBUILD}"}
            return
        self.nvcc, looked = self._find()
        if not self.nvcc:
            reason = f"nvcc was not found ({looked})"
            if setting == "1":
                raise BuildError(f"jrl: JRL_CUDA=1, but {reason}")
            self.skipped = {"reason": reason, "fix": f"install the CUDA toolkit, then: JRL_CUDA=1 {REBUILD}"}
            return
        output = run([self.nvcc, "--version"]).stdout
        release = re.search(r"V(\d+\.\d+\.\d+)", output)
        if release is None:
            raise BuildError(
                f"jrl: {self.nvcc} --version does not work; set JRL_CUDA=0 to build without CUDA"
            )
        self.version = release.group(1)
        self.architectures = self._architectures()
        if not sources:
            self.skipped = {"reason": "there is no CUDA source to compile", "fix": "none is needed"}
            self.architectures = []

    def _find(self) -> tuple[str, str]:
        """Its path, or "" and where it was looked for. A toolkit that is named is the only one considered."""
        for variable in ("CUDA_HOME", "CUDA_PATH"):
            home = os.environ.get(variable)
            if home:
                return shutil.which("nvcc", path=str(Path(home, "bin"))) or "", f"{variable} is {home}"
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        return found or "", "looked in PATH and /usr/local/cuda; CUDA_HOME names another place"

    def _architectures(self) -> list[str]:
        supported = set(re.findall(r"sm_(\d+[af]?)", run([self.nvcc, "--list-gpu-code"]).stdout))
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
        chosen = []
        for entry in asked or DEFAULT_ARCHITECTURES:
            capability, code, _ = parse_architecture(entry)
            if capability < MINIMUM_CAPABILITY:
                self.notes.append(f"{entry} was left out: the kernels need compute capability 8.0 or newer")
            elif code.rstrip("af") in {name.rstrip("af") for name in supported}:
                chosen.append(entry)
            elif asked:
                raise BuildError(f"jrl: TORCH_CUDA_ARCH_LIST: nvcc {self.version} cannot compile for {entry}")
            else:
                self.notes.append(f"{entry} was left out: nvcc {self.version} cannot compile for it")
        if not chosen:
            raise BuildError("jrl: TORCH_CUDA_ARCH_LIST names no compute capability of 8.0 or newer")
        if not asked and not chosen[-1].endswith("+PTX"):
            chosen[-1] += "+PTX"
        return chosen

    def flags(self) -> list[str]:
        flags = []
        for entry in self.architectures:
            _, code, ptx = parse_architecture(entry)
            flags += ["-gencode", f"arch=compute_{code},code=sm_{code}"]
            if ptx:
                flags += ["-gencode", f"arch=compute_{code},code=compute_{code}"]
        return flags


class Plan:
    """What is compiled on this machine, with what; and why the rest is not."""

    def __init__(self) -> None:
        self.cpu_sources = sorted(ROOT.glob("csrc/cpu/*.cpp"))
        self.host = HostCompiler()
        if self.host.missing is not None and cuda_setting() == "1":
            raise BuildError(f"jrl: JRL_CUDA=1, but {self.host.missing['reason']}")
        self.cuda_sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
        self.cuda = CudaCompiler(self.cuda_sources) if self.host.missing is None else None
        if self.cuda is None or self.cuda.skipped is not None:
            self.cuda_sources = []

    def build_info(self, version: str) -> dict[str, object]:
        cuda = self.cuda
        return {
            "version": version,
            "python": platform.python_version(),
            "platform": sysconfig.get_platform(),
            "extension": self.host.missing is None,
            "skipped": self.host.missing,
            "compiler": self.host.version,
            "openmp": self.host.openmp,
            "cpu_sources": [] if self.host.missing else [path.name for path in self.cpu_sources],
            "cuda": {
                "compiled": bool(self.cuda_sources),
                "nvcc": cuda.version if cuda else "",
                "architectures": cuda.architectures if cuda else [],
                "sources": [path.name for path in self.cuda_sources],
                "skipped": cuda.skipped if cuda else self.host.missing,
                "notes": cuda.notes if cuda else [],
            },
        }

    def summary(self) -> str:
        if self.host.missing is not None:
            return (
                f"jrl: extension skipped: {self.host.missing['reason']}; to fix: {self.host.missing['fix']}"
            )
        assert self.cuda is not None
        if self.cuda.skipped is not None:
            return (
                f"jrl: CPU extension only: {self.cuda.skipped['reason']}; to fix: {self.cuda.skipped['fix']}"
            )
        return f"jrl: CPU and CUDA extension: nvcc {self.cuda.version}, {' '.join(self.cuda.architectures)}"


PLAN = Plan()


def write_if_changed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def write_info(folder: Path, info: dict[str, object]) -> None:
    write_if_changed(folder / "jrl_kernels" / "_build_info.json", json.dumps(info, indent=2) + "\n")


class BuildPython(build_py):
    """Also writes what was compiled and why the rest was not, for a machine that has no extension to ask."""

    def run(self) -> None:
        super().run()
        print(PLAN.summary(), file=sys.stderr)
        target = ROOT if self.editable_mode else Path(self.build_lib)
        write_info(target, PLAN.build_info(self.distribution.get_version()))


class BuildExtension(build_ext):
    """Compiles with ninja: parallel, and only what changed."""

    def run(self) -> None:
        info = PLAN.build_info(self.distribution.get_version())
        if self.inplace:
            print(PLAN.summary(), file=sys.stderr)
        if PLAN.host.missing is None:
            self._compile(json.dumps(info))
        if self.inplace:
            write_info(ROOT, info)

    def _compile(self, info: str) -> None:
        folder = ROOT / "build" / f"native{sysconfig.get_config_var('EXT_SUFFIX')}"
        write_if_changed(folder / "jrl_build_info.h", f'#define JRL_BUILD_INFO R"json({info})json"\n')
        built = folder / "_C.so"
        write_if_changed(folder / "build.ninja", ninja_file(folder, built))
        command = [*ninja_command(), "-C", str(folder), "-j", str(jobs()), "--quiet"]
        if subprocess.run(command, check=False).returncode != 0:
            raise BuildError("jrl: the extension did not compile; JRL_CUDA=0 builds without CUDA")
        extension = self.extensions[0]
        target = Path(self.get_ext_fullpath(extension.name) if not self.inplace else inplace_path())
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a running process keeps the file it has mapped.
        shutil.copyfile(built, f"{target}.new")
        os.replace(f"{target}.new", target)


def inplace_path() -> Path:
    return ROOT / "jrl_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def ninja_command() -> list[str]:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if not found:
            raise BuildError("jrl: ninja was not found; to fix: pip install ninja") from None
        return [found]
    return [str(Path(ninja.BIN_DIR, "ninja"))]


def ninja_file(folder: Path, built: Path) -> str:
    import pybind11

    host, cuda = PLAN.host, PLAN.cuda
    includes = [f"-I{ROOT / 'csrc' / 'include'}"]
    python_includes = [
        f"-I{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include(), folder)
    ]
    openmp = ["-fopenmp"] if host.openmp else []
    link = [*host.command, *openmp, *shared_flags()]
    if PLAN.cuda_sources:
        assert cuda is not None
        link = [cuda.nvcc, "-ccbin", host.executable, "-shared", "-cudart", "static", *cuda.flags()]
        link += ["-Xcompiler", "-fopenmp"] if openmp else []
    if sys.platform.startswith("linux"):
        # The runtime inside stays private: torch brings its own libcudart.
        link += ["-Xlinker", "--exclude-libs,ALL"] if PLAN.cuda_sources else ["-Wl,--exclude-libs,ALL"]
    lines = ["ninja_required_version = 1.5"]
    lines += [
        rule(
            "cxx",
            [*host.command, *CXX_FLAGS, *openmp, *includes, "$flags", "-MMD", "-MF", "$out.d"],
            "-c $in -o $out",
        )
    ]
    if PLAN.cuda_sources:
        assert cuda is not None
        nvcc = [
            cuda.nvcc,
            "-ccbin",
            host.executable,
            *NVCC_FLAGS,
            *cuda.flags(),
            *includes,
            "-MMD",
            "-MF",
            "$out.d",
        ]
        lines += [rule("nvcc", nvcc, "-c $in -o $out")]
    lines += [f"rule link\n  command = {shell(link)} $in -o $out\n  description = link $out\n"]
    objects = []
    for source in [ROOT / "csrc" / "bindings.cpp", *PLAN.cpu_sources, *PLAN.cuda_sources]:
        target = f"{source.name}.o"
        kind = "nvcc" if source.suffix == ".cu" else "cxx"
        lines.append(f"build {escape(target)}: {kind} {escape(str(source))}")
        if source.name == "bindings.cpp":
            lines.append(f"  flags = {shell(python_includes)}")
        objects.append(escape(target))
    lines.append(f"build {escape(built.name)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def rule(name: str, command: list[str], files: str) -> str:
    return (
        f"rule {name}\n  command = {shell(command)} {files}\n  depfile = $out.d\n  deps = gcc\n"
        f"  description = {name} $in\n"
    )


def shell(words: list[str]) -> str:
    """Words as one ninja command line; ninja's own variables stay."""
    return " ".join(
        word if word.startswith("$") else shlex.quote(word.replace("$", "$$")) for word in words
    ).replace("'$out.d'", "$out.d")


def escape(path: str) -> str:
    """A path as ninja writes it."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[] if PLAN.host.missing else [Extension("jrl_kernels._C", sources=[])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
)
