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

// Attributes are the options that a volume can have.
func (v *Volumes) Attributes() []string { return []string{optionFiles, optionMode} }

// Check says what is wrong with the options of a volume: see ParseOptions.
func (v *Volumes) Check(options map[string]string) error {
	_, err := ParseOptions("/volume", nil, options)
	return err
}

// Keep keeps the directory of a pod until ctx ends; end it before the directory is removed. It reports why the files cannot
// be written, and nil when key, chain and bundle are there for the first time, and then no more: the files of a pod stand
// before its first container starts. It returns an error at once where the options are wrong.
func (v *Volumes) Keep(ctx context.Context, k *agent.Kept, dir string, gid *int, options map[string]string, report func(error)) error {
	c, err := ParseOptions(dir, gid, options)
	if err != nil {
		return err
	}
	c.Log = v.log
	name := "files in " + c.Dir
	if pod := k.Workload().Pod; pod != (agent.Pod{}) {
		name = "files of pod " + pod.String() + " in " + c.Dir
	}
	return keep(ctx, k, k.NewReader(name), c, report)
}
