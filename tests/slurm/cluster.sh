#!/bin/bash
# A SLURM cluster on this machine, for the tests: `cluster.sh up`, `cluster.sh down`, as root, with the packages munge,
# slurmctld, slurmd and slurm-client. Every node is a slurmd with its own network namespace and host name, on an isolated
# bridge. A rank that uses `localhost` as its master address therefore fails, as on a real cluster. The GPUs are character
# devices without function. All nodes but the last share $DIR/private; the last one has an empty folder in its place, for
# tests of files that are missing or late on a node. `cluster.sh node N` starts the slurmd of one node again.
set -euo pipefail
DIR=/var/tmp/sd-training-slurm
CONF=/etc/slurm/slurm.conf # the default path, since the plugin's job steps lose SLURM_CONF
NODES=16 CPUS=48 GPUS=8 NET=10.77.0 MARK="# sd-training test cluster"
PIDS=$DIR/pids
unset "${!SLURM_@}"

main() {
    case ${1:-} in
    up) up ;;
    down) down ;;
    node) start_node "$2" ;;
    *) echo "usage: cluster.sh up | down | node N" >&2 && exit 2 ;;
    esac
}

up() {
    [[ $EUID -eq 0 ]] || die "must be root"
    for tool in munged slurmctld slurmd sbatch ip; do
        command -v "$tool" >/dev/null || die "$tool is not installed (munge slurmctld slurmd slurm-client iproute2)"
    done
    [[ ! -e $CONF ]] || grep -q "$MARK" "$CONF" || die "$CONF is another cluster's"
    down
    mkdir -p /etc/slurm /run/munge "$DIR"/{log,state,spool,run,gpus,private} && install -d -m 0700 "$DIR/munge"
    : >"$PIDS"
    make_network && make_gpus && write_conf
    (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge/key")
    munged --force --key-file="$DIR/munge/key" --pid-file="$DIR/munge/pid" --log-file="$DIR/munge/log" \
        --seed-file="$DIR/munge/seed" --socket=/run/munge/munge.socket.2
    wait_for 10 munge -n
    cat "$DIR/munge/pid" >>"$PIDS"
    start head slurmctld -D -c
    wait_for 20 controller_is_up
    for n in $(seq "$NODES"); do start_node "$n"; done
    wait_for 60 nodes_are_idle "$NODES"
}

# End the daemons that `up` started, by their process ids, and their jobs; then remove everything that `up` created.
down() {
    [[ -e $PIDS ]] || return 0
    timeout 10 scancel --user=root --full 2>/dev/null && sleep 1
    local steps=()
    mapfile -t steps < <(pgrep -f "^slurmstepd: \[" || true) # all belong to this cluster, the only one on the machine
    for signal in TERM KILL; do
        for pid in $(tac "$PIDS") "${steps[@]}"; do ours "$pid" && kill -"$signal" "$pid" 2>/dev/null; done
        for _ in $(seq 50); do any_alive || break; sleep 0.1; done
    done
    for n in $(seq "$NODES"); do # with processes that jobs left in it
        for pid in $(ip netns pids "sd-n$n" 2>/dev/null); do kill -KILL "$pid" 2>/dev/null || true; done
        ip link delete "sd-v$n" 2>/dev/null || true
        ip netns delete "sd-n$n" 2>/dev/null || true
    done
    ip link delete sd-slurm 2>/dev/null || true
    sed "/ $MARK\$/d" /etc/hosts >"$DIR/hosts" && cat "$DIR/hosts" >/etc/hosts # it may be a mount: keep the file itself
    rm -rf "$DIR" "$CONF" /etc/slurm/gres.conf
}

make_network() {
    ip link add sd-slurm type bridge
    ip address add $NET.254/24 dev sd-slurm && ip link set sd-slurm up
    echo "$NET.254 head $MARK" >>/etc/hosts
    for n in $(seq "$NODES"); do
        ip netns add "sd-n$n"
        ip link add "sd-v$n" type veth peer name eth0 netns "sd-n$n"
        ip link set "sd-v$n" master sd-slurm up
        ip -n "sd-n$n" address add $NET."$n"/24 dev eth0
        ip -n "sd-n$n" link set eth0 up && ip -n "sd-n$n" link set lo up
        echo "$NET.$n n$n $MARK" >>/etc/hosts
    done
}

make_gpus() {
    for gpu in $(seq 0 $((GPUS - 1))); do mknod -m 666 "$DIR/gpus/nvidia$gpu" c 1 3; done # as /dev/null
    echo "Name=gpu Type=fake File=$DIR/gpus/nvidia[0-$((GPUS - 1))]" >/etc/slurm/gres.conf
}

write_conf() {
    cat >$CONF <<CONF
$MARK
ClusterName=test
SlurmctldHost=head($NET.254)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny,DisableIPv6
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
# No cgroups, systemd or binding: memory use is polled every second
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,default_queue_depth=200
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
MinJobAge=600
SlurmdTimeout=15
BatchStartTimeout=10
MessageTimeout=10
EnforcePartLimits=ALL
PropagateResourceLimits=NONE
DefMemPerCPU=200
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobs.txt
NodeName=DEFAULT CPUs=$CPUS Sockets=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:fake:$GPUS
NodeName=n[1-$NODES] NodeAddr=n[1-$NODES] Port=[17001-$((17000 + NODES))]
PartitionName=DEFAULT Nodes=n[1-$NODES] MaxTime=INFINITE PriorityTier=1
PartitionName=cpu Default=YES
PartitionName=gpu
PartitionName=lab AllowAccounts=lab
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
CONF
}

start_node() {
    mkdir -p "$DIR/spool/n$1"
    start "n$1" slurmd -D -N "n$1"
}

# start HOST COMMAND…: start a daemon in the host's network, under the host's name
start() {
    local host=$1 enter=(unshare --uts)
    shift
    [[ $host == head ]] || enter=(nsenter "--net=/run/netns/sd-$host" "${enter[@]}")
    [[ $host != n$NODES ]] || enter+=(unshare --mount sh -c 'mount -t tmpfs none "$0"; exec "$@"' "$DIR/private")
    setsid "${enter[@]}" sh -c 'hostname "$0"; exec "$@"' "$host" "$@" </dev/null &>>"$DIR/log/$host.out" &
    echo $! >>"$PIDS"
}

ours() { grep -qE '^(munged|slurmctld|slurmd|slurmstepd)' "/proc/$1/comm" 2>/dev/null; }
any_alive() { for pid in $(<"$PIDS"); do ours "$pid" && return 0; done; return 1; }
controller_is_up() { scontrol ping | grep -q 'is UP'; }
nodes_are_idle() { [[ $(sinfo -h -N -p cpu -t idle -o %N | sort -u | wc -l) -eq $1 ]]; }
die() { echo "error: $*" >&2 && exit 1; }

# wait_for SECONDS COMMAND…: repeat the command until it succeeds
wait_for() {
    local tries=$(($1 * 10))
    shift
    for _ in $(seq "$tries"); do "$@" &>/dev/null && return 0 || sleep 0.1; done
    die "waited too long for: $*; see $DIR/log"
}

main "$@"
