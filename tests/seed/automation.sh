#!/usr/bin/env bash
set -euo pipefail

# Deploy and capture the output
DEPLOY=$(heyvm deploy ./my-app \
  --name "ci-sandbox-$$" \
  --port 8080 \
  --start-command "npm start" \
  --health-path /health \
  --ttl-seconds 1800 \
  --format json)

SANDBOX_ID=$(echo "$DEPLOY" | jq -r '.id')
PUBLIC_URL=$(echo "$DEPLOY" | jq -r '.urls[0].url')

echo "Sandbox $SANDBOX_ID running at $PUBLIC_URL"

# Run integration tests against the public URL
heyvm exec "$SANDBOX_ID" --format json -- npm test \
  | jq -r '.stdout'

# Tear down
heyvm stop "$SANDBOX_ID"
