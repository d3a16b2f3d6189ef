#!/bin/sh
# Trains the embedded checkpoint from nothing: sh scripts/train_mini.sh FOLDER; the last two stages, the first of them
# on a GPU, where one is named: DEVICE=cuda:0 sh scripts/train_mini.sh FOLDER. What it wrote lies in FOLDER/mini-*,
# then FOLDER/more/mini-*; the last prior in FOLDER/averaged/mini-prior.
# Every stage goes on where it was stopped; a finished one takes seconds. MoVQ and teacher do not depend on each
# other, nor do prior, decoder and image tower: on two cores run them two at a time, with one thread each.
set -eu
out=${1:-build/mini}
here=$(dirname "$0")
export PYTHONPATH="$here/.." OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
train() { script=$1; shift; "${PYTHON:-python}" "$here/$script.py" --bf16 "$@"; }

# 1. The autoencoder, on the busier crops; then its decoding half alone, so that the latents stay as they are.
train train_movq --out "$out/movq-crops" --steps 2000 --batch-size 32 --crop 32 --decay 0.5 --sample-every 200
train train_movq --out "$out/movq" --init "$out/movq-crops" --freeze-encoder --steps 1500 --batch-size 16 \
    --learning-rate 1e-3 --decay 0.6 --save-dtype float16

# 2. The embeddings: a convolutional teacher, then the text tower on its embeddings.
train train_clip --stage teacher --out "$out/clip" --steps 5200 --decay 0.5 --learning-rate 1.5e-3 \
    --picture-weight 20
train train_clip --stage text --out "$out/clip" --steps 900 --decay 0.5 --learning-rate 2e-3 --warmup 50

# 3. Prior and decoder, from the teacher's embeddings; the text tower learns with the prior what belongs to what.
train train_prior --clip "$out/clip" --out "$out/prior" --count 50000 --steps 10000 --batch-size 128 \
    --noises 4 --train-text --decay 0.5 --learning-rate 1.2e-3
train train_decoder --clip "$out/clip" --movq "$out/movq-crops" --out "$out/mini-decoder" --count 30000 \
    --steps 9000 --decay 0.5 --embedding-noise 0.15 --learning-rate 1.2e-3
# Then the prior on its own guided steps: without, guidance leads it astray. Same data, encoded once.
mkdir -p "$out/mini-prior/training"
for name in train fresh; do
    from="$out/prior/training/embeddings-$name.safetensors" to="$out/mini-prior/training/embeddings-$name.safetensors"
    [ -e "$to" ] || { cp "$from" "$to.part" && mv "$to.part" "$to"; }
done
train train_prior --clip "$out/clip" --init "$out/prior" --out "$out/mini-prior" --count 50000 --steps 1450 \
    --batch-size 128 --noises 4 --train-text --own-steps 0.5 --decay 0.7 --warmup 100 --ema 0.997

# 4. The image tower learns the teacher's embeddings.
train train_clip --stage image --out "$out/clip" --steps 5000 --decay 0.5

# 5. No further step: puts the finished tower and the finished autoencoder into the two repositories.
# Each --count is that of stage 3, whose encoded pictures are read.
train train_prior --clip "$out/clip" --init "$out/prior" --out "$out/mini-prior" --count 50000 \
    --steps 1450 --train-text
train train_decoder --clip "$out/clip" --movq "$out/movq" --out "$out/mini-decoder" --count 30000 --steps 9000

# 6. The same decoder for inpainting and for depth hints, from what the prior draws of the captions: a picture's own
# embedding says where everything is, and beside it a hint or the known pixels would never be read.
start="--clip $out/clip --movq $out/movq --init $out/mini-decoder --prior $out/mini-prior --steps 3000"
train train_decoder $start --task inpaint --out "$out/mini-decoder-inpaint" --count 30000
train train_decoder $start --task hint --out "$out/mini-controlnet-depth" --count 12000

# 7. More of the same on a GPU, eight minutes on an H200 with the first two and the last two side by side: two layers
# more for the prior, batches two to eight times as large, more pictures. Before, the autoencoder's decoding half again,
# on the CPU: the embedded one's stage 1 had no loss for spots.
[ -n "${DEVICE:-}" ] || exit 0
on_gpu() {
    script=$1
    shift
    "${PYTHON:-python}" "$here/$script.py" --clip "$out/clip" --device "$DEVICE" --workers 5 --encode-batch 1024 \
        --warmup 100 --ema 0.998 --batch-size 512 --save-every 1000 --sample-every 100000 "$@"
}
decoder() { on_gpu train_decoder --movq "$out/more/movq" --decay 0.6 "$@"; }
task() { decoder --init "$out/more/mini-decoder" --prior "$out/more/mini-prior" --count 60000 "$@"; }
train train_movq --out "$out/more/movq" --init "$out/movq" --freeze-encoder --steps 900 --batch-size 16 \
    --learning-rate 1e-3 --warmup 30 --decay 0.7 --ema 0.99 --save-dtype float16
on_gpu train_prior --init "$out/mini-prior" --out "$out/more/mini-prior" --add-layers 2 --count 200000 --steps 1861 \
    --noises 4 --train-text --own-steps 0.5 --decay 0.7
decoder --init "$out/mini-decoder" --out "$out/more/mini-decoder" --count 150000 --steps 1762 --embedding-noise 0.15
task --task inpaint --out "$out/more/mini-decoder-inpaint" --steps 2058
task --task hint --out "$out/more/mini-controlnet-depth" --steps 1745 --batch-size 128

# 8. The prior once more, on other and busier shapes, on the CPU; then the mean of it and of what it started from.
busier="--seed 20 --object-weights 3 4 3 --count 60000"
train train_prior --clip "$out/clip" --init "$out/more/mini-prior" --out "$out/busier/mini-prior" $busier --steps 1350 \
    --batch-size 128 --noises 4 --train-text --own-steps 0.5 --learning-rate 5e-4 --warmup 50 --decay 0.7 --ema 0.997
mkdir -p "$out/averaged/mini-prior"
for part in "$out/more/mini-prior"/*; do
    case $part in */training) ;; *) cp -R "$part" "$out/averaged/mini-prior/" ;; esac
done
for network in prior text_encoder; do
    "${PYTHON:-python}" "$here/average_weights.py" --overwrite --out "$out/averaged/mini-prior/$network" \
        "$out/more/mini-prior/$network" "$out/busier/mini-prior/$network"
done
