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
	optionGroup = "fsGroup"
	maxOption   = 256
)

// ParseOptions reads what a volume asks for: `files`, the sets of names, separated by commas; `filesMode`, the mode of the
// key's file, octal; `fsGroup`, the group that owns the files. Other keys are not looked at. ok: files are asked for.
//
// Without a mode the key of a volume is 0640 for its fsGroup, and 0644 where it has none, as projected volumes of
// Kubernetes have it: which user a container runs as is not known here, and nobody but the pod can enter its volume.
func ParseOptions(dir string, options map[string]string) (c Config, ok bool, err error) {
	list, ok := options[optionFiles]
	if !ok {
		if _, set := options[optionMode]; set {
			return Config{}, false, fmt.Errorf("%s is set without %s: say which names the files are to have, such as files: tls", optionMode, optionFiles)
		}
		return Config{}, false, nil
	}
	for _, key := range []string{optionFiles, optionMode, optionGroup} {
		if len(options[key]) > maxOption {
			return Config{}, false, fmt.Errorf("%s is longer than %d bytes", key, maxOption)
		}
	}
	c = Config{Dir: dir, Mode: 0o644}
	if c.Names, err = ParseNames(list); err != nil {
		return Config{}, false, fmt.Errorf("%s: %w", optionFiles, err)
	}
	if s := options[optionGroup]; s != "" {
		gid, err := strconv.ParseUint(s, 10, 31)
		if err != nil {
			return Config{}, false, fmt.Errorf("%s: %q is no group's number", optionGroup, s)
		}
		group := int(gid)
		c.GID, c.Mode = &group, 0o640
	}
	if s := options[optionMode]; s != "" {
		mode, err := strconv.ParseUint(s, 8, 32)
		if err != nil || mode == 0 || mode > 0o777 {
			return Config{}, false, fmt.Errorf("%s: %q is no file mode: write it in octal, like \"0640\"", optionMode, s)
		}
		c.Mode = fs.FileMode(mode)
	}
	if err := c.Check(); err != nil {
		return Config{}, false, err
	}
	return c, true, nil
}
