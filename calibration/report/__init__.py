"""In: the files of a checkpoint. Out: a page and pictures that show what is in it.

Read page.py first: what is shown. contents.py reads the files, width_map.py and charts.py draw, trade_off.py asks the
integer program what other sizes would have brought, markup.py makes elements of HTML and SVG.
"""
