//go:build !linux || !(amd64 || arm64)

package bolt

import (
	"errors"
	"os"
)

// openAsync has no way here.
func openAsync(*os.File) (walFile, error) { return nil, errors.ErrUnsupported }
