"""What `make demo` trains: the four architectures, three seeds each, on the same 589,824 tokens of the standard library.

    python study.py config/study_demo.py

Then plot.py makes out/demo/report.md of the runs.
"""

out_dir = "out/demo"
configs = ["config/demo.py"]
arms = {name: {"architecture": name} for name in ("dense", "mod", "dtf", "stt")}
seeds = [1, 2, 3]
reference = "dense"
jobs = 2  # of one thread each: quicker than one run after another with two threads
speed = False  # plot.py measures decoding, alone on the machine
