"""examples/theory.py at a tiny size."""

from importlib import import_module

import pytest


@pytest.fixture
def theory():
    return import_module("examples.theory")


def rows_of(path):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in path.read_text().splitlines()]


def test_help(theory, capsys):
    with pytest.raises(SystemExit) as end:
        theory.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "python examples/theory.py" in text and "(default: 200)" in text


def test_agents_and_claims(theory, tmp_path):
    options = ["--agents", "grpo", "vmr+panw", "best_of_n", "--updates", "3", "--seeds", "0", "--out", str(tmp_path)]
    theory.main(["--parts", "claims", "agents", "middle", *options])
    agents = rows_of(tmp_path / "agents.md")
    assert [row[0] for row in agents[2:]] == ["grpo", "vmr+panw", "best_of_n", "where VMR ends, exactly"]
    assert 0 < float(agents[2][1]) < 1 and agents[4][1:] == [""] * 3  # it learns; nothing is learned
    assert (tmp_path / "agents.png").stat().st_size > 10_000
    head, _, *claims = rows_of(tmp_path / "claims.md")
    for row in claims:
        values = {name: float(cell) for name, cell in zip(head[2:], row[2:], strict=True)}
        assert max(values.values()) == values["eq. 3"] and values["family"] == values["family's values, m=1"]
        assert values["family"] >= max(values["theorem 1"], values["theorem 2, m=1"], values["theorem 2, m=2"])
    penalised = [row for row in rows_of(tmp_path / "middle.md") if row[0].startswith("R -") and row[1] == "1"]
    assert penalised[0][3:] == ["0.00%"] * 6


def test_random_tables(theory, tmp_path):
    theory.main(["--parts", "random", "--tables", "2", "--out", str(tmp_path)])
    assert len(rows_of(tmp_path / "random.md")) == 2 + 3 * 5


def test_an_unknown_agent(theory, tmp_path):
    with pytest.raises(SystemExit, match="unknown agent 'gpro'"):
        theory.main(["--parts", "agents", "--agents", "gpro", "--out", str(tmp_path)])
