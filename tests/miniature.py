"""The driver on a world small enough for tests, also as a child process that can be killed at a chosen moment."""

import multiprocessing
import os
import signal

FLAGS = (
    "--tiny_epochs 6 --tiny_hidden 32 --tiny_layers 1 "
    "--sft_steps 6 --sft_lr 2e-3 --sft_stop 0 --sft_batch_size 8 --steps 7 "
    "--prompts_per_step 6 --group_size 4 --lr 2e-3 --tau 1 --min_groups 8 --warmup_steps 2 --replay_groups 5 "
    "--buffer_size 20 --max_new_tokens 6 --eval_every 0 --save_every 2 --tiny_batch_size 24 --max_tokens 200"
).split()


def driver(*argv):
    """Run the driver in this process, on one thread."""
    import torch

    import rerule

    torch.set_num_threads(1)
    rerule.main(rerule.configure([str(flag) for flag in argv]))


def main(*argv):
    """Run the driver on a small world with FLAGS and then `argv`."""
    from benchmarks import builtin
    from engine.run import LOCKS

    sizes = dict(N_TARGETS=3, N_HARD=3, N_EASY=3, N_UNKNOWN=2)
    before = {name: getattr(builtin, name) for name in sizes}
    vars(builtin).update(sizes)
    try:
        driver(*FLAGS, *argv)
    finally:
        vars(builtin).update(before)
        LOCKS.clear()  # as at a process's end: another may go on


def child(argv, kill_at):
    """`main`, killed with SIGKILL once the row (method, step) is logged, or halfway through the n-th ("save", n)."""
    from engine import files, run

    write, save, saves = files.Log.write, run.torch.save, []

    def killing_write(log, row):
        write(log, row)
        if kill_at == (row["method"], row["step"]) and "loss" in row:
            log.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def killing_save(state, file):
        saves.append(0)
        if kill_at == ("save", len(saves)):
            file.write(b"half a state")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    files.Log.write, run.torch.save = killing_write, killing_save
    main(*argv)


def start(argv, kill_at=None):
    """Run `child` in a fresh process and return its exit code: −9 after a SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rerule"])
    process = context.Process(target=child, args=([str(a) for a in argv], kill_at))
    process.start()
    process.join()
    return process.exitcode
