"""benchmarks/house.py counts the code of a package correctly, here one of three files with known counts."""

from benchmarks import house

FILES = {
    "__init__.py": '"""Nothing."""\n',
    "api.py": """
from chargpt_jax import config
from chargpt_jax.model.gpt import GPT

def run(x: int) -> GPT: ...
""",
    "config.py": """
from typing import Any

def f(x: 'dict[str, Any]') -> int:
    def g(*, y: Any): ...

    return 1
""",
    "model/gpt.py": """
class GPT:
    def apply(self):
        from chargpt_jax.config import f, Any

        x: Any = f
""",
    "model/init.py": "from .gpt import GPT\nimport chargpt_jax.config\n",
}


def counted(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "chargpt_jax" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return house.count(tmp_path)


def test_count_finds_arrows_of_every_form_of_import(tmp_path):
    assert counted(tmp_path).arrows == {
        ("api.py", "config.py"),
        ("api.py", "model/gpt.py"),
        ("model/gpt.py", "config.py"),
        ("model/init.py", "config.py"),
        ("model/init.py", "model/gpt.py"),
    }


def test_count_merges_arrows_of_the_same_folder(tmp_path):
    assert counted(tmp_path).folder_arrows == {("api.py", "config.py"), ("api.py", "model"), ("model", "config.py")}


def test_count_finds_any_in_signatures_only(tmp_path):
    found = counted(tmp_path)
    assert found.signatures == 4
    assert found.loose == ("config.py:f", "config.py:f.g")


def test_count_measures_lines(tmp_path):
    found = counted(tmp_path)
    assert found.files["config.py"] == 7
    assert found.functions["config.py:f"] == 4
    assert found.folders == {"": 3, "model": 2}


def test_main_prints_a_column_for_each_checkout(tmp_path, capsys):
    counted(tmp_path)
    house.main([str(house.ROOT), str(tmp_path)])
    assert f"| {house.ROOT.name} | {tmp_path.name} |" in capsys.readouterr().out
