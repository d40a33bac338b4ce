#!/bin/sh
# Replace the tag of every image under deploy/ by the digest it stands for now, so that a tag that
# is moved later changes nothing. Needs docker with buildx, and the registries of the images.
#
#   deploy/pin-images.sh          pin; run it again after a tag was changed
#   deploy/pin-images.sh --check  exit with 1 where an image has no digest
set -eu
cd "$(dirname "$0")"
files="docker/Dockerfile compose.yaml kubernetes/router.yaml"
# image references: `FROM x` and `image: x`; the image that is built here has no registry
images=$(sed -nE 's/^(FROM|[[:space:]]*image:)[[:space:]]+([^[:space:]]*[:/][^[:space:]]*).*/\2/p' $files | sort -u)
for image in $images; do
    case $image in
    *@sha256:*) continue ;;
    esac
    if [ "${1:-}" = --check ]; then
        echo "$image has no digest" >&2
        missing=1
        continue
    fi
    digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$image")
    case $digest in
    sha256:????????????????????????????????????????????????????????????????) ;;
    *) echo "error: the registry gave no digest for $image: '$digest'" >&2; exit 1 ;;
    esac
    sed -i "s#\($image\)\$#\1@$digest#; s#\($image\) #\1@$digest #" $files
    echo "$image@$digest"
done
exit "${missing:-0}"
