#!/usr/bin/env bash
# The whole report on a laptop: train every network on the toy, evaluate it by every protocol,
# ensemble the networks, and print the report's tables with our figures beside the report's.
#
#     tests/laptop.sh [OUT]                     OUT: the folder for all results (runs/laptop)
#     SEEDS="0 1 2" tests/laptop.sh             three seeds; the tables then show mean and spread
#     FLAGS="--epochs 1" tests/laptop.sh small  more flags for train.py, here for a short trial
#     DATA=videos/toy tests/laptop.sh           another toy (otherwise train.py draws runs/toy)
#
# After an interruption, run the same command again: it goes on where it stopped.
set -euo pipefail

# OUT and DATA are relative to the caller's folder, everything else to the project's.
absolute() {
    case "$1" in
        /*) echo "$1" ;;
        *) echo "$PWD/$1" ;;
    esac
}

out=$(absolute "${1:-runs/laptop}")
seeds=${SEEDS:-0}
train_flags=(--recipe toy --resume)
evaluate_flags=(--split val)
if [ -n "${DATA:-}" ]; then
    train_flags+=(--data "$(absolute "$DATA")")
    evaluate_flags+=(--data "$(absolute "$DATA")")
fi
cd "$(dirname "$0")/.."

scores=()  # every score file, for the tables

# train NAME FLAG ...: train one network into $folder/NAME. A finished run is left as it is.
# FLAGS is not quoted, so that it is split into words.
train() {
    local name=$1
    shift
    torchrun train.py "$@" --out "$folder/$name" --seed "$seed" "${train_flags[@]}" ${FLAGS:-}
}

# evaluate NAME PROTOCOL: write $folder/NAME-PROTOCOL.npz, unless it is newer than the checkpoint.
evaluate() {
    local checkpoint=$folder/$1/best.pt
    local protocol=$2
    local file=$folder/$1-$protocol.npz
    if [ ! "$file" -nt "$checkpoint" ]; then
        python evaluate.py --checkpoint "$checkpoint" "${evaluate_flags[@]}" \
            --protocol "$protocol" --out "$file"
    fi
    scores+=("$file")
}

# ensemble NAME FILE ...: write $folder/NAME.npz.
ensemble() {
    local file=$folder/$1.npz
    shift
    python ensemble.py "$@" --out "$file"
    scores+=("$file")
}

for seed in $seeds; do
    folder=$out/seed$seed

    # Five networks, and two of SlowFast's variants: the slow and the fast pathway alone. The toy's
    # videos are short, so these two get clips of their own: 8 frames of every 3rd, 12 of every 2nd.
    for model in tsn trn tsm tin slowfast; do
        train $model --model $model
    done
    train slow --model slowfast --variant slow_8x8 --frames 8 --stride 3
    train fast --model slowfast --variant fast_16x2 --frames 12 --stride 2

    for name in tsn trn tsm tin; do
        evaluate $name clip
        evaluate $name dense
    done
    for name in slowfast slow fast; do
        evaluate $name clip
        evaluate $name dense
        evaluate $name multiscale
    done

    # The two ensembles of Table 2: the video models, then all models.
    video_scores=("$folder"/{slowfast,slow,fast}-multiscale.npz)
    image_scores=("$folder"/{tsn,trn,tsm,tin}-dense.npz)
    ensemble ensemble-video "${video_scores[@]}"
    ensemble ensemble-all "${video_scores[@]}" "${image_scores[@]}"
done

python tests/tables.py "${scores[@]}"
