"""Runs `trapo_jax.train` and sends a signal to this process at a specified point of the run.

python signal_at.py ACTIVITY STEP REPORT SIGNAL [FIELD=VALUE ...]
"""

import os
import sys

from trapo_jax.runs.run import Run


def signal_at(set_attribute, activity, step, report, number):
    """Makes a run send itself a signal when it reports progress in an activity such as "evaluating test" in `step`.

    Progress reports are numbered from 1; report 0 is the beginning of the activity. Reports after the signal are
    printed. `set_attribute` is the function that replaces methods of `Run`.
    """
    begin, on_progress = Run.begin, Run.on_progress
    num_reports = 0

    def count_report(run, name):
        nonlocal num_reports
        if (run.step, name) == (step, activity):
            if num_reports == report:
                os.kill(os.getpid(), number)
            if num_reports > report:
                print(f"report {num_reports} after the signal", flush=True)
            num_reports += 1

    def begin_and_count(run, name, *args, **kwargs):
        begin(run, name, *args, **kwargs)
        count_report(run, name)

    def report_and_count(run, progress):
        count_report(run, run._activity)
        on_progress(run, progress)

    set_attribute(Run, "begin", begin_and_count)
    set_attribute(Run, "on_progress", report_and_count)


if __name__ == "__main__":
    from trapo_jax.train import main

    activity, step, report, number, *arguments = sys.argv[1:]
    signal_at(setattr, activity, int(step), int(report), int(number))
    sys.exit(main(arguments))
