package files

import (
	"context"
	"log/slog"

	"github.com/meshca/meshca/agent"
)

// Volumes are the directories of pods. Its methods are safe for concurrent use.
type Volumes struct {
	log *slog.Logger
}

// NewVolumes makes them; log gets what happens, slog.Default where it is nil.
func NewVolumes(log *slog.Logger) *Volumes { return &Volumes{log} }

// Check says what is wrong with the options of a volume: see ParseOptions.
func (v *Volumes) Check(dir string, options map[string]string) error {
	_, _, err := ParseOptions(dir, options)
	return err
}

// Put writes what the workload has now and returns when it is there: the files of a pod stand before its first container
// starts. It does nothing where the options ask for no files.
func (v *Volumes) Put(k *agent.Kept, dir string, options map[string]string) error {
	c, ok, err := ParseOptions(dir, options)
	if err != nil || !ok {
		return err
	}
	m, _ := k.Materials()
	return Put(m, c)
}

// Keep keeps the directory of a pod until ctx ends; end it before the directory is removed. It returns at once where the
// options ask for no files, or are wrong.
func (v *Volumes) Keep(ctx context.Context, k *agent.Kept, dir string, options map[string]string) error {
	c, ok, err := ParseOptions(dir, options)
	if err != nil || !ok {
		return err
	}
	c.Log = v.log
	return Keep(ctx, k, k.NewReader("files in "+c.Dir), c)
}
