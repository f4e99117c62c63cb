"""Names of users as text of figures."""

from matplotlib import font_manager

from vlmprune_jax.run.report import style


def test_letters_that_no_font_has(monkeypatch):
    own = [font for font in font_manager.fontManager.ttflist if font.name == style._FONT]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    style._font_of.cache_clear()
    assert style.legible("é中") == "é\\u4e2d"
    assert style.legible("$a$" + "b" * 100) == r"\$a\$" + "b" * 27 + "..." + "b" * 7
    style._font_of.cache_clear()
