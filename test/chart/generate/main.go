// Generate writes what is made of the Helm chart and committed: `make manifests` runs it.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/meshca/meshca/test/chart"
	"github.com/meshca/meshca/test/parts"
)

func main() {
	if err := run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	root, err := parts.Root()
	if err != nil {
		return err
	}
	manifests, err := chart.PlainManifests(ctx)
	if err != nil {
		return err
	}
	values, err := os.ReadFile(filepath.Join(root, chart.Dir, "values.yaml"))
	if err != nil {
		return err
	}
	readme, err := os.ReadFile(filepath.Join(root, chart.README))
	if err != nil {
		return err
	}
	table, err := chart.WithTable(string(readme), string(values))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, chart.README), []byte(table), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(root, chart.Manifests), []byte(manifests), 0o644)
}
