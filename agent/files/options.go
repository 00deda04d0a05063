package files

import (
	"fmt"
	"io/fs"
	"strconv"
)

// The keys of options, and the bound of their values in bytes.
const (
	optionFiles = "files"
	optionMode  = "filesMode"
	maxOption   = 256
)

// ParseOptions reads what a volume asks for: `files`, the sets of names, separated by commas, and `filesMode`, the mode of
// the key's file, octal. Other keys are not looked at.
//
// Without a mode the key of a volume is 0640 for gid, the pod's fsGroup, and 0644 where that is nil, as projected volumes
// of Kubernetes have it: which user a container runs as is not known here, and nobody but the pod can enter its volume.
func ParseOptions(dir string, gid *int, options map[string]string) (c Config, err error) {
	list, ok := options[optionFiles]
	if !ok {
		return Config{}, fmt.Errorf("%s is missing: say which names the files are to have, such as files: tls", optionFiles)
	}
	for _, key := range []string{optionFiles, optionMode} {
		if len(options[key]) > maxOption {
			return Config{}, fmt.Errorf("%s is longer than %d bytes", key, maxOption)
		}
	}
	c = Config{Dir: dir, Mode: 0o644}
	if c.Names, err = ParseNames(list); err != nil {
		return Config{}, fmt.Errorf("%s: %w", optionFiles, err)
	}
	if gid != nil {
		c.GID, c.Mode = gid, 0o640
	}
	if s := options[optionMode]; s != "" {
		mode, err := strconv.ParseUint(s, 8, 32)
		if err != nil || mode == 0 || mode > 0o777 {
			return Config{}, fmt.Errorf("%s: %q is no file mode: write it in octal, like \"0640\"", optionMode, s)
		}
		c.Mode = fs.FileMode(mode)
	}
	if err := c.Check(); err != nil {
		return Config{}, err
	}
	return c, nil
}
