package agent

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/meshca/meshca/api/refusal"
)

const (
	maxTokenBytes  = 16 << 10
	maxBundleBytes = 4 << 20
)

// errTooLarge is what readFile says of a file over its limit.
var errTooLarge = errors.New("the file is larger than it may be")

// readFile reads a regular file of at most limit bytes. It never waits on a pipe or a device that someone put there.
func readFile(path string, limit int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file (%v)", path, info.Mode())
	}
	data, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return nil, err
	}
	if len(data) > limit {
		return nil, fmt.Errorf("%s: %w (%d bytes)", path, errTooLarge, limit)
	}
	return data, nil
}

// token is a service-account token on its way from its file to the CA; it prints as a placeholder.
type token struct{ secret string }

func (token) String() string               { return "(token)" }
func (token) Format(f fmt.State, _ rune)   { _, _ = io.WriteString(f, "(token)") }
func (token) MarshalText() ([]byte, error) { return []byte("(token)"), nil }

// readToken reads a token file: TOKEN_UNREADABLE, TOKEN_TOO_LARGE or TOKEN_MISSING.
func readToken(path string) (token, error) {
	data, err := readFile(path, maxTokenBytes)
	switch {
	case errors.Is(err, errTooLarge):
		return token{}, refusal.New(refusal.TokenTooLarge, "%w", err)
	case err != nil:
		return token{}, refusal.New(refusal.TokenUnreadable, "%w", err)
	}
	secret := strings.TrimSpace(string(data))
	if secret == "" {
		return token{}, refusal.New(refusal.TokenMissing, "%s is empty", path)
	}
	return token{secret}, nil
}

// replaceFile puts data at path, readable by the agent alone: after a crash there is the old file or the new one.
func replaceFile(path string, data []byte) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, temporary+"*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err == nil {
		err = syncDir(dir)
	}
	return err
}

// temporary is how names of files begin that were not finished.
const temporary = ".tmp-"

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// privateDir makes a directory that only the agent can enter, and takes what others may do with an existing one away.
func privateDir(path string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is no directory", path)
	}
	if owner, us := ownerOf(info), os.Geteuid(); owner != us {
		return fmt.Errorf("%s belongs to uid %d, this agent is uid %d", path, owner, us)
	}
	if info.Mode().Perm()&^fs.FileMode(0o700) != 0 {
		return os.Chmod(path, 0o700)
	}
	return nil
}
