"""The parts of ``tools/report.py``.

Reading runs and samples, series, figures and the plots made of them, the summary, cards of samples, the page.

``figures`` (style, palette, mean with interval, SVG and PNG) and ``page`` (cards, tables, sections, the document) know
nothing of training runs: other tools build their pages from them.
"""
