"""Time grids to the bit, and Euler steps against an explicit loop."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kimia.errors import ParameterError
from kimia.model.dit import load_dit
from kimia.model.flow import NAIVE_EULER, NEURAL_ODE_EULER, commit, solve, time_grid
from tests.golden_data import golden, golden_json
from tests.model.tiny_detokenizer import FLOW, PlainDiT, random_dit

pytestmark = pytest.mark.parity


# ---- grids ------------------------------------------------------------------------------------------------------


def test_golden_grids():
    for points, solvers in golden_json("detokenizer", "time_grid.json").items():
        assert list(time_grid(int(points)).indices) == solvers["neural_ode_euler"]["t_index"], points
        naive = time_grid(int(points), NAIVE_EULER)
        assert list(naive.indices) == solvers["naive_euler"]["t_index"], points
        assert naive.sizes == (solvers["naive_euler"]["step"],) * int(points)


def test_thirty_points_are_twenty_nine_steps():
    grid = time_grid(30)
    assert len(grid.indices) == len(grid.sizes) == 29
    assert grid.indices[:4] == (0, 34, 68, 103)
    assert grid.indices[-2:] == (931, 965)
    assert sum(grid.sizes) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("points", "step", "index"), [(15, 7, 499), (16, 9, 599), (3, 1, 500), (11, 3, 300)])
def test_float32_accumulation_decides_the_index(points, step, index):
    assert time_grid(points).indices[step] == index


@pytest.mark.parametrize("points", range(2, 202))
def test_the_grid_is_what_adding_up_the_steps_gives(points):
    """The release's own loop, in float32."""
    grid = torch.linspace(0, 1, points, dtype=torch.float32)
    time, indices, sizes = grid[0], [], []
    for target in grid[1:]:
        sizes.append(float(target - time))
        indices.append(int(time * 1000))
        time = time + (target - time)
    found = time_grid(points)
    assert found.indices == tuple(indices)
    assert found.sizes == tuple(sizes)


def test_naive_grid_reaches_the_end_with_a_constant_step():
    grid = time_grid(5, NAIVE_EULER)
    assert grid.indices == (0, 250, 500, 750, 1000)
    assert grid.sizes == ((1 - 1e-4) / 5,) * 5


@pytest.mark.parametrize(("points", "solver"), [(1, NEURAL_ODE_EULER), (0, NAIVE_EULER), (30, "dopri5")])
def test_illegal_grids_are_refused(points, solver):
    with pytest.raises(ParameterError):
        time_grid(points, solver)


# ---- solving ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ode2", "ode11", "ode30", "naive30"])
def test_golden_solve(name):
    folder = golden("detokenizer")
    unit = load_file(folder / "unit.safetensors")
    dit = load_dit(folder / "checkpoint" / "audio_detokenizer", "cpu", torch.float32)
    solver = NAIVE_EULER if name.startswith("naive") else NEURAL_ODE_EULER
    grid = time_grid(int(name.removeprefix("naive").removeprefix("ode")), solver)
    chunk = dit.chunk(unit["ode.tokens"][None], 1, 0, dit.empty_prefix())
    mel = solve(dit, unit["ode.noise"][None], chunk, grid)[0] * dit.config.mel_std + dit.config.mel_mean
    torch.testing.assert_close(mel, unit[f"{name}.mel"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("solver", [NEURAL_ODE_EULER, NAIVE_EULER])
def test_solve_is_the_explicit_loop(solver):
    dit, tokens = random_dit(), [1, 1, 6, 6]
    plain = PlainDiT(dit)
    noise = torch.randn(4, FLOW.mel_bins, generator=torch.Generator().manual_seed(1))
    grid = time_grid(6, solver)
    got = solve(dit, noise[None], dit.chunk(torch.tensor([[1, 6]]), 2, 9, dit.empty_prefix()), grid)[0]
    x = noise.double()
    for index, size in zip(grid.indices, grid.sizes, strict=True):
        x = x + size * torch.from_numpy(plain(x, tokens, index, 9)[0])
    torch.testing.assert_close(got.double(), x, atol=2e-5, rtol=0)


def test_state_stays_float32_when_the_network_does_not():
    dit = random_dit().to(torch.bfloat16)
    noise = torch.randn(1, 4, FLOW.mel_bins, generator=torch.Generator().manual_seed(1))
    solved = solve(dit, noise, dit.chunk(torch.tensor([[1, 6]]), 2, 0, dit.empty_prefix()), time_grid(4))
    assert solved.dtype == torch.float32
    assert not torch.equal(solved, solved.bfloat16().float())


def test_commit_writes_the_finished_mel_at_999():
    dit = random_dit()
    mel = torch.randn(1, 4, FLOW.mel_bins, generator=torch.Generator().manual_seed(1))
    chunk = dit.chunk(torch.tensor([[1, 6]]), 2, 5, dit.empty_prefix())
    commit(dit, mel, chunk)
    _, heard = PlainDiT(dit)(mel[0], [1, 1, 6, 6], 999, 5)
    for head in range(FLOW.heads):
        np.testing.assert_allclose(chunk.cache.keys[1, 0, head].numpy(), heard[1][head][0], atol=2e-5)
        np.testing.assert_allclose(chunk.cache.values[1, 0, head].numpy(), heard[1][head][1], atol=2e-5)
