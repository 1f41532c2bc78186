"""Ships the startup hook's ``.pth`` and ``.start`` files to site-packages, in wheels and in editable installs."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

# Python's `site` reports a fault in such a line on standard error and goes on
PTH = (
    'import os; os.environ.get("E5V_AUTOLOAD", "").strip().lower() in ("0", "false", "no", "off")'
    ' or __import__("e5v_st.autoload").autoload.install()\n'
)
HOOK_FILES = {"e5v_st.pth": PTH, "e5v_st.start": "e5v_st.autoload:install\n"}


class BuildWithHook(build_py):
    """Writes the hook's files beside the packages."""

    def run(self) -> None:
        """See setuptools."""
        super().run()
        if not self.editable_mode:
            for name, content in HOOK_FILES.items():
                Path(self.build_lib, name).write_text(content, encoding="utf8")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """See setuptools."""
        return super().get_outputs(include_bytecode) + [str(Path(self.build_lib, name)) for name in HOOK_FILES]


class EditableWithHook(editable_wheel):
    """Puts the hook's files into the wheel that links to this directory."""

    def _select_strategy(self, *args: object) -> object:
        strategy = super()._select_strategy(*args)
        stock = type(strategy).__call__

        def add_hook(self: object, wheel: object, *rest: object) -> None:
            stock(self, wheel, *rest)
            for name, content in HOOK_FILES.items():
                wheel.writestr(name, content)

        strategy.__class__ = type("WithHook", (type(strategy),), {"__call__": add_hook})
        return strategy


setup(cmdclass={"build_py": BuildWithHook, "editable_wheel": EditableWithHook})
