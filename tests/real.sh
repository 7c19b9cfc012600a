#!/usr/bin/env bash
# The report on real films: cut out their frames, train the networks from scratch, evaluate them by
# every protocol, ensemble them, and print tables.
#
#     tests/real.sh tank FOLDER [OUT]             OUT: the folder for all results (runs/tank)
#     tests/real.sh grid FOLDER [OUT]             (runs/grid)
#     NETWORKS="tsn tin" tests/real.sh ...        these alone, of tsn trn tsm tin slowfast slow fast
#     FRAMES=16 tests/real.sh ...                 frames of TSN, TSM and TIN; SlowFast takes more
#     SEEDS="0 1 2" FLAGS="--epochs 40" tests/real.sh ...      as in laptop.sh
#
# After an interruption, run the same command again: it goes on where it stopped. FOLDER holds films
# that anyone can copy; they stay there.
#
# tank: 496 films of railway wagons from surveillance cameras, 3 to 20 seconds, with three labels:
# what happens, inside or outside, which location. 320 train and 176 validate, as its authors say.
#     git clone https://github.com/LawrenceGrigoryan/tank-state-video-classification FOLDER
#
# grid: 1,000 films of one speaker, 3 seconds each, who says sentences such as "bin blue at f two
# now": six labels. Only the mouth is seen, without sound. A fifth validates, of the same speaker.
#     git clone --bare --depth 1 https://github.com/TVR28/LipNet lipnet.git
#     mkdir FOLDER && git -C lipnet.git archive HEAD data/s1 | tar x -C FOLDER
#
# On one CPU core, about: the frames of tank take 6 minutes (and 4.7 GB); TSN, TSM, TIN and SlowFast
# train for 7 minutes each; scoring takes 2 minutes a network, SlowFast 6.
set -euo pipefail

absolute() {
    case "$1" in
        /*) echo "$1" ;;
        *) echo "$PWD/$1" ;;
    esac
}

films=${1:?tank or grid}
folder=$(absolute "${2:?the folder that holds the films}")
out=$(absolute "${3:-runs/$films}")
data=$out/data
networks=${NETWORKS:-tsn trn tsm tin slowfast slow fast}
cd "$(dirname "$0")/.."

# ---- films -> frames ---------------------------------------------------------------------------

case $films in
    tank)
        frames=${FRAMES:-8}
        labels_scale=3.67               # 11 classes / 3 labels a film
        # 256 of a film's 300 frames
        slowfast=(--variant slowfast_8x8 --frames $((2 * frames)) --stride $((128 / frames)))
        slow=(--variant slow_8x8 --frames 8 --stride 32)
        fast=(--variant fast_16x2 --frames 16 --stride 16)
        if [ ! -e "$data/val.txt" ]; then
            python tests/real.py lists tank "$folder" "$out"
            for split in train val; do
                python data.py extract --videos "$folder/data/train" --list "$out/$split.csv" \
                    --out "$data" --split $split
            done
        fi
        ;;
    grid)
        frames=${FRAMES:-16}
        labels_scale=8.5                # 51 classes / 6 labels a film
        # 88 of a film's 90 frames
        slowfast=(--variant slowfast_11x8 --frames 44 --stride 2)
        slow=(--variant slow_8x8 --frames 11 --stride 8)
        fast=(--variant fast_32x2 --frames 44 --stride 2)
        if [ ! -e "$data/val.txt" ]; then
            python tests/real.py lists grid "$folder" "$out"
            mkdir -p "$out/mouths"
            for film in "$folder"/data/s1/*.mpg; do
                mouth=$out/mouths/$(basename "$film" .mpg).mp4
                if [ ! -e "$mouth" ]; then
                    ffmpeg -nostdin -v error -y -i "$film" -an -vf crop=112:80:100:176 \
                        -c:v libx264 -crf 14 "$out/part.mp4"
                    mv "$out/part.mp4" "$mouth"
                fi
            done
            python data.py extract --videos "$out/mouths" --list "$out/films.csv" --out "$data" \
                --val 0.2
        fi
        ;;
    *)
        echo "$films: tank or grid" >&2
        exit 2
        ;;
esac
python data.py check "$data"

# ---- frames -> scores --------------------------------------------------------------------------

# One page of settings for all networks, small enough for a CPU. A mirrored film keeps its labels,
# so half of the clips are flipped. A SlowFast clip covers most of a film: three clips suffice.
page=(
    --data "$data" --init none --loss-scale $labels_scale --channels-last
    --batch 8 --reference-batch 8 --lr 0.02 --schedule cosine --epochs 10 --warmup 0
    --clip-grad 5 --weight-decay 5e-4
    --augment jitter --jitter 48 60 --crop 48
    --test-resize 55 --test-crop 48 --clips 3 --scales 55 62 69
)

# train NAME FLAG ...: train one network into $runs/NAME. A finished run is left as it is. FLAGS is
# not quoted, so that it is split into words.
train() {
    local name=$1
    shift
    torchrun train.py "$@" "${page[@]}" --out "$runs/$name" --seed "$seed" --resume ${FLAGS:-}
}

# evaluate NAME PROTOCOL: write $runs/NAME-PROTOCOL.npz, unless it is newer than the checkpoint.
evaluate() {
    local checkpoint=$runs/$1/best.pt
    local file=$runs/$1-$2.npz
    if [ "$file" -nt "$checkpoint" ]; then
        return
    fi
    if [ "$2" = shuffled ]; then
        python tests/real.py shuffled "$checkpoint" "$data" "$file"
    else
        python evaluate.py --checkpoint "$checkpoint" --data "$data" --protocol "$2" --out "$file"
    fi
}

# ensemble NAME MEMBER ...: score files of two or more members, with equal and with fitted weights.
ensemble() {
    local name=$1
    shift
    if [ $# -gt 1 ]; then
        local members=("${@/#/$runs/}")  # a folder before each name
        members=("${members[@]/%/.npz}")
        python ensemble.py "${members[@]}" --out "$runs/$name-equal.npz"
        python ensemble.py "${members[@]}" --fit --out "$runs/$name-fitted.npz"
    fi
}

for seed in ${SEEDS:-0}; do
    runs=$out/seed$seed
    video=""  # names of score files
    image=""
    for name in $networks; do
        case $name in
            tsn | tsm | tin) train $name --model $name --backbone resnet18 --frames "$frames" ;;
            trn) train trn --model trn --backbone resnet18 --frames 8 ;;  # no more than 10
            slowfast) train slowfast --model slowfast --depth 14 "${slowfast[@]}" ;;
            slow) train slow --model slowfast --depth 14 "${slow[@]}" ;;
            fast) train fast --model slowfast --depth 14 "${fast[@]}" ;;
        esac
        for protocol in clip shuffled dense; do
            evaluate $name $protocol
        done
        case $name in
            slowfast | slow | fast)
                evaluate $name multiscale
                video+=" $name-multiscale"
                ;;
            *) image+=" $name-dense" ;;
        esac
    done
    ensemble video $video
    ensemble all $video $image
done

python tests/real.py table $films "$out"
python tests/real.py claims "$out"
