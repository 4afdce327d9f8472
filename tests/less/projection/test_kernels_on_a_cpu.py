"""The Triton kernels without a GPU: interpreted, compiled but not run, chosen, and done without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from less.models import ParamLayout
from less.projection import PROJECTIONS, ProjectionConfig, make_projector, projector

HERE = Path(__file__).parent


def python(*args, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args],
        cwd=HERE.parents[2], env=os.environ | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
def test_the_kernels_hold_under_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    done = python(
        "-m", "pytest", HERE / "test_kernels.py", "-q", "-p", "no:cacheprovider",
        TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from less.adam import UPDATE_RULES, PreparedRule
from less.projection import kernels

class Absent:
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

class Compiled:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        def compile(*args, **kwargs):
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            assert compiled.asm["cubin"]
            versions.add(compiled.hash)
        return compile

versions = set()
driver.set_active(Absent())
kernels._sparse_kernel = Compiled(kernels._sparse_kernel)
kernels._rademacher_kernel = Compiled(kernels._rademacher_kernel)
for B, p, K in ((1, 63, 1), (16, 4608, 1000), (33, 12288, 8192)):
    sums, block, moments = torch.zeros(2, B, K), torch.zeros(B, p), torch.ones(p)
    squares = torch.zeros(2 * kernels.num_tiles(K), B), torch.zeros(2 * kernels.num_tiles(K), B)
    for rule in UPDATE_RULES:
        mu = moments if rule in ("adam", "adam-less") else None
        nu = None if rule in ("sgd", "sign") else moments
        prepared = PreparedRule(rule, mu, nu, 0.1, 1e-7)
        kernels.add_sparse_(sums, block, prepared, (1, 2**32 - 1), (2**31, 16), squares)
    kernels.add_sparse_(sums[:1], block, PreparedRule("sgd"), (1, 2), (3, 4))
    kernels.add_rademacher_(sums[0], block, (2**32 - 1, 0))
    num_versions = len(versions)
    kernels.add_sparse_(sums, block, prepared, (2**32 - 1, 1), (5, 32), squares)
    assert len(versions) == num_versions, "a key is no reason to compile again"
print("compiled", len(versions))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_as_they_are_called(tmp_path, capability) -> None:
    """What the interpreter cannot see: types, layouts, and that the machine code is made."""
    pytest.importorskip("triton")
    done = python("-c", COMPILE, str(capability), TRITON_CACHE_DIR=str(tmp_path), OMP_NUM_THREADS="1")
    assert "compiled" in done.stdout, done.stderr


def test_everything_imports_and_works_without_triton() -> None:
    code = f"""
import sys
sys.modules["triton"] = None
import torch
from less.models import ParamLayout
from less.projection import ProjectionConfig, kernels, make_projector
for kind in {PROJECTIONS}:
    projector = make_projector(ProjectionConfig(kind=kind, proj_dim=20), ParamLayout(("a",), ((63,),)))
    sums = projector.new_sums(3, torch.device("cpu"))
    projector.project_add_(sums.features_SBK[0], torch.ones(3, 63), "a")
    assert not projector._runs_kernels(torch.device("cuda"))
    print(kind, bool(sums.features_BK.any()))
"""
    done = python("-c", code)
    assert done.stdout.split() == [word for kind in PROJECTIONS for word in (kind, "True")], done.stderr


def test_a_gpu_runs_the_kernels_where_there_is_triton(monkeypatch) -> None:
    own = make_projector(ProjectionConfig(proj_dim=20), ParamLayout(("a",), ((63,),)))
    monkeypatch.setattr(projector, "_kernels_agree", lambda device: True)
    for installed in (True, False):
        monkeypatch.setattr(projector, "_has_triton", lambda installed=installed: installed)
        assert own._runs_kernels(torch.device("cuda:1")) == installed
        assert not own._runs_kernels(torch.device("cpu"))


def fails(device: torch.device) -> bool:
    raise RuntimeError("no such architecture")


@pytest.mark.parametrize(("trial", "told"), [(lambda device: False, "numbers differ"), (fails, "no such architecture")])
def test_kernels_that_fail_their_trial_are_not_used(monkeypatch, trial, told) -> None:
    from less.projection import kernels

    own = make_projector(ProjectionConfig(proj_dim=20), ParamLayout(("a",), ((63,),)))
    monkeypatch.setattr(kernels, "agree_with_twins", trial)
    monkeypatch.setattr(projector, "_has_triton", lambda: True)
    projector._kernels_agree.cache_clear()
    with pytest.warns(UserWarning, match=told):
        assert not own._runs_kernels(torch.device("cuda:7"))
    assert not own._runs_kernels(torch.device("cuda:7"))  # and it is said once
    projector._kernels_agree.cache_clear()


def test_triton_without_a_c_compiler_is_no_triton(monkeypatch) -> None:
    pytest.importorskip("triton")
    has_triton = projector._has_triton.__wrapped__
    monkeypatch.delenv("CC", raising=False)
    for present in ({"gcc"}, {"clang"}, set()):
        monkeypatch.setattr("shutil.which", lambda name, present=present: name if name in present else None)
        assert has_triton() == bool(present)


def test_triton_is_not_imported_for_a_cpu() -> None:
    code = """
import sys
import torch
from less.models import ParamLayout
from less.projection import ProjectionConfig, make_projector
for kind in ("sparse", "rademacher"):
    projector = make_projector(ProjectionConfig(kind=kind, proj_dim=20), ParamLayout(("a",), ((63,),)))
    projector.project_add_(torch.zeros(3, 20), torch.ones(3, 63), "a")
print("less.projection.kernels" in sys.modules)
"""
    assert python("-c", code).stdout.strip() == "False"
