#!/usr/bin/env bash
# The whole report on a laptop: train every network on the toy, evaluate it by every protocol,
# ensemble the networks, and print the report's tables with our figures beside the report's.
#
#     tests/laptop.sh [OUT]                     OUT: the folder for all results (runs/laptop)
#     SEEDS="0 1 2" tests/laptop.sh             three seeds; the tables then show mean and spread
#     FLAGS="--epochs 1" tests/laptop.sh small  more flags for train.py, here for a short trial
#     DATA=videos/toy tests/laptop.sh           another toy (otherwise runs/toy, drawn if it is absent)
#     CLAIMS=1 tests/laptop.sh                  also trains TIN with all that the report tried, and
#                                               prints a table of the report's claims
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
data=$(absolute "${DATA:-$(dirname "$0")/../runs/toy}")
seeds=${SEEDS:-0}
cd "$(dirname "$0")/.."
if [ ! -e "$data" ]; then
    python data.py toy "$data"
fi

# train NAME FLAG ...: train one network into $folder/NAME. A finished run is left as it is.
# FLAGS is not quoted, so that it is split into words.
train() {
    local name=$1
    shift
    torchrun train.py "$@" --recipe toy --data "$data" --out "$folder/$name" --seed "$seed" \
        --resume ${FLAGS:-}
}

# evaluate NAME PROTOCOL ...: write $folder/NAME-PROTOCOL.npz, if it is older than the checkpoint.
evaluate() {
    local name=$1
    local checkpoint=$folder/$name/best.pt
    shift
    for protocol in "$@"; do
        local file=$folder/$name-$protocol.npz
        if [ ! "$file" -nt "$checkpoint" ]; then
            python evaluate.py --checkpoint "$checkpoint" --data "$data" --protocol "$protocol" \
                --out "$file"
        fi
    done
}

scores=()  # every score file, for the tables
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
        evaluate $name clip dense
    done
    for name in slowfast slow fast; do
        evaluate $name clip dense multiscale
    done

    # The two ensembles of Table 2: the video models, then all models.
    video_scores=("$folder"/{slowfast,slow,fast}-multiscale.npz)
    all_scores=("${video_scores[@]}" "$folder"/{tsn,trn,tsm,tin}-dense.npz)
    python ensemble.py "${video_scores[@]}" --out "$folder/video-equal.npz"
    python ensemble.py "${all_scores[@]}" --out "$folder/all-equal.npz"
    scores+=("$folder"/{tsn,trn,tsm,tin}-{clip,dense}.npz)
    scores+=("$folder"/{slowfast,slow,fast}-{clip,dense,multiscale}.npz)
    scores+=("$folder"/{video,all}-equal.npz)

    # What the report tried, one change at a time. The toy's rate is 0.03, its decay 5e-4, its loss
    # scale 10 classes / 1.7 labels = 5.88. LSEP and WARP are no means over classes: scale 1, and a
    # fifth of it, since their gradients are long.
    if [ -n "${CLAIMS:-}" ]; then
        train tin-scale1 --model tin --loss-scale 1
        train tin-scale4 --model tin --loss-scale 23.5
        train tin-rate --model tin --loss-scale 1 --lr 0.176
        train tin-rate-decay --model tin --loss-scale 1 --lr 0.176 --weight-decay 8.5e-5
        train tin-lsep --model tin --loss lsep --loss-scale 1
        train tin-lsep-fifth --model tin --loss lsep --loss-scale 0.2
        train tin-warp --model tin --loss warp --loss-scale 1
        train tin-warp-fifth --model tin --loss warp --loss-scale 0.2
        train tin-sqrt --model tin --class-weight sqrt
        train tin-ratio --model tin --class-weight ratio
        train tin-16 --model tin --frames 16
        train fast-half --model slowfast --variant fast_16x2 --frames 6 --stride 4
        for name in tin-{scale1,scale4,rate,rate-decay,sqrt,ratio,16} \
            tin-{lsep,warp}{,-fifth} fast-half; do
            evaluate $name clip
        done
        for name in tsm tin; do
            python tests/real.py shuffled "$folder/$name/best.pt" "$data" \
                "$folder/$name-shuffled.npz"
        done
        python ensemble.py "${all_scores[@]}" --fit --out "$folder/all-fitted.npz"
    fi
done

python tests/tables.py "${scores[@]}"
if [ -n "${CLAIMS:-}" ]; then
    python tests/real.py claims "$out"
fi
