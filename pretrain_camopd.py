"""Train a specialist to recover its general abilities by CaMOPD; also make the specialist, and generate responses.

    torchrun --nproc-per-node N pretrain_camopd.py \
        --load SPECIALIST --general-teacher-load GENERAL --save RUN \
        --general-prompts general.jsonl --domain-prompts domain.jsonl <Megatron flags> <CaMOPD flags>

    torchrun --nproc-per-node N pretrain_camopd.py --stage sft \
        --load GENERAL --save RUN --conversations domain.jsonl --seq-length 4096 <Megatron flags>
    torchrun --nproc-per-node N pretrain_camopd.py --stage generate --load MODEL --prompts FILE --responses FILE

``--dry-run [PROCESSES]`` checks everything and prints the resolved plan, without GPUs.
Running the same command again resumes from the newest checkpoint in ``--save``. ``--help`` lists every flag.

Exit status: 0; 2 after one line that says what is wrong with the flags or files; 3 if training diverged; 4 if the
rollout engine did not hold the student's weights; 75 if a checkpoint or record could not be written, if the rollout
failed in another way, or after SIGTERM. After 75, run the same command again: it resumes from the newest checkpoint,
which includes the steps done if it could still be written.
torchrun reports the status of the processes, and itself ends with 1.
"""

import os
import sys
import time


def main() -> int:
    """Run the command and return its exit status."""
    # Imported here, so that loading this file alone is cheap (multiprocessing loads it in child processes).
    import torch

    from megatron_camopd import errors
    from megatron_camopd.config.words import printable
    from megatron_camopd.runtime import accelerator
    from megatron_camopd.runtime.signals import end_with_launcher

    end_with_launcher()
    accelerator.activate()  # before Megatron is imported
    from megatron_camopd.stages.start import run_command

    statuses: dict[type[Exception], int] = {
        errors.ConfigurationError: 2,
        errors.TrainingDivergedError: 3,
        errors.StaleEngineError: 4,
        errors.RolloutError: os.EX_TEMPFAIL,
        errors.SaveError: os.EX_TEMPFAIL,
        errors.InterruptedRunError: os.EX_TEMPFAIL,
    }
    try:
        text = run_command()
        if text is not None:
            print(text)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except tuple(statuses) as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank and isinstance(error, errors.InterruptedRunError):
            return os.EX_TEMPFAIL  # rank 0 says it
        if rank:  # rank 0 often meets the same error: torchrun then ends the other ranks before they repeat it
            time.sleep(5)
        where = f" on rank {rank}" if rank else ""
        print(f"pretrain_camopd.py: error{where}: {printable(str(error))}", file=sys.stderr, flush=True)
        return next(status for kind, status in statuses.items() if isinstance(error, kind))
    return 0


if __name__ == "__main__":
    sys.exit(main())
