"""The files of a checkpoint and of a run that is not finished.

Read writer.py first: shards, index, side files. report.py is quantization_report.json; workdir.py keeps finished work
in OUT.partial, under the identity (identity.py) of the run that it belongs to. size.py counts what a checkpoint will
weigh, and lists the linears whose widths are to be decided.
"""
