# What the sbatch scripts of this folder share; sourced inside of a job with the arguments of pretrain_zebra.py.
# What differs between clusters stands in the first two parts: change it here.

# --- Where Python comes from
source "${VENV:-.venv}/bin/activate"
python=(python)
container=()
# In a container with pyxis and enroot (enroot import makes the .sqsh file):
# container=(--container-image="$PWD/megazebra.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
# In a container with Apptainer (--nv: with the GPUs):
# python=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" megazebra.sif python)

# --- What the nodes need
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0   # where a run hangs at its start: the interface that joins the nodes
# export NCCL_IB_HCA=mlx5                                  # the InfiniBand adapters; NCCL_DEBUG=INFO shows which it takes
# export TRITON_CACHE_DIR="/tmp/triton-$USER"              # a home folder on the network is slow for many small files
# Where a shared file system is too slow for the corpora, copy them to every node's own disk (the run compares the copies):
# srun --ntasks-per-node=1 cp -r data/corpus /tmp/corpus && set -- "$@" --data.path=/tmp/corpus/train

# --- The run
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)   # a container may have no scontrol
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))           # jobs that share a node must not share a port
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"                      # srun does not take it from the job by itself
logs="$SLURM_JOB_NAME-$SLURM_JOB_ID"
mkdir -p "$logs"
echo "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST; rank 0 writes to $logs/0.log"

# --kill-on-bad-exit=0, also where the cluster's own setting is 1: all ranks of a run that was asked to stop end with 85, and
# the first would have the others killed, whose signal then hides it. --wait ends a run that has lost a rank as surely, a
# minute after.
code=0
srun --kill-on-bad-exit=0 --wait=60 --output="$logs/%t.log" --open-mode=append "${container[@]}" "${python[@]}" pretrain_zebra.py "$@" || code=$?
# Over ssh instead: deepspeed --hostfile FILE pretrain_zebra.py "$@", with lines `NODE slots=8`. No signal of Slurm reaches
# such ranks: what is lost is what came after the last regular checkpoint.

if [ "$code" -eq 85 ]; then   # saved after a signal: the next start resumes from there
    echo "stopped and saved: requeued"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
echo "ended with exit code $code"
exit "$code"
