"""Trains like `python -m trapo_jax.train`, and sends itself a signal at a named moment.

    python signal_at.py ACTIVITY STEP REPORT SIGNAL [FIELD=VALUE ...]

The signal is sent before the report with this number, starting at 1, of an activity such as "evaluating test", while
the run is at this step; report 0 is the begin of the activity. Afterwards, only the reports that follow are printed.
"""

import os
import sys

from trapo_jax.runs.run import Run
from trapo_jax.train import main

activity, step, report, number, *arguments = sys.argv[1:]
begin, on_progress = Run.begin, Run.on_progress
num_reports = 0


def count_report(run, name):
    global num_reports
    if (run.step, name) == (int(step), activity):
        if num_reports == int(report):
            os.kill(os.getpid(), int(number))
        if num_reports > int(report):
            print(f"report {num_reports} after the signal", flush=True)
        num_reports += 1


def begin_and_count(run, name, num_samples=0):
    begin(run, name, num_samples)
    count_report(run, name)


def report_and_count(run, progress):
    count_report(run, run._activity)
    on_progress(run, progress)


Run.begin, Run.on_progress = begin_and_count, report_and_count
sys.exit(main(arguments))
