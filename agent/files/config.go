package files

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
)

// Config is one directory of files.
type Config struct {
	// Dir is the directory, an absolute path; it is made where it is missing. Nobody but the agent and root may be able
	// to write to it. Names in it that are not of the sets are left alone. Required.
	Dir string
	// Names are the sets of names to write. Required.
	Names []Names
	// Mode of the files that hold the key. 0600 where it is 0, and 0640 where GID is set. The others are 0644.
	Mode fs.FileMode
	// UID and GID own the files; the agent's own where nil.
	UID, GID *int
	// After tells a process of a change; nil: nobody is told.
	After *Hook
	// Log gets what happens; slog.Default where it is nil.
	Log *slog.Logger
}

// publicMode is that of files which hold nothing secret.
const publicMode = 0o644

func (c Config) withDefaults() Config {
	if c.Dir != "" {
		c.Dir = filepath.Clean(c.Dir)
	}
	switch {
	case c.Mode != 0:
	case c.GID != nil:
		c.Mode = 0o640
	default:
		c.Mode = 0o600
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c
}

// Check finds what is wrong with the configuration as such, all of it at once; the file system is not looked at.
func (c Config) Check() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	switch {
	case c.Dir == "":
		wrong("dir is missing: name the directory of the files")
	case !filepath.IsAbs(c.Dir):
		wrong("dir: %q is not an absolute path", c.Dir)
	case filepath.Clean(c.Dir) == "/":
		wrong("dir: / is no place for a key: name a directory of its own")
	}
	if len(c.Names) == 0 {
		wrong("names is missing: istio, gke, tls, credentialbundle, or several")
	}
	for _, n := range c.Names {
		if n.kinds() == nil {
			wrong("names: %.40q is no set of names: istio, gke, tls or credentialbundle", string(n))
		}
	}
	if c.Mode&^0o777 != 0 || c.Mode != 0 && c.Mode&0o400 == 0 {
		wrong("mode %v: it is that of the key's file, at least 0400, and permissions alone", c.Mode)
	}
	if c.Mode&0o133 != 0 {
		wrong("mode %v lets others write the key, or somebody run it", c.Mode)
	}
	if c.UID != nil && *c.UID < 0 || c.GID != nil && *c.GID < 0 {
		wrong("uid and gid are numbers from 0 on")
	}
	if c.After != nil {
		if err := c.After.check(); err != nil {
			wrong("after: %w", err)
		}
	}
	return errors.Join(errs...)
}
