package selinux

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLabel(t *testing.T) {
	var set []string
	setxattr := func(result error) func(string, string, []byte, int) error {
		return func(path, attr string, data []byte, _ int) error {
			set = append(set, path+" "+attr+" "+string(data))
			return result
		}
	}
	selinux := t.TempDir()
	if err := labelWhere(filepath.Join(selinux, "none"), "/dir", setxattr(nil)); err != nil || len(set) > 0 {
		t.Errorf("without SELinux: %q, %v", set, err)
	}
	if err := labelWhere(selinux, "/dir", setxattr(nil)); err != nil || len(set) != 1 || set[0] != "/dir security.selinux system_u:object_r:container_file_t:s0\x00" {
		t.Errorf("with SELinux: %q, %v", set, err)
	}
	if err := labelWhere(selinux, "/dir", setxattr(unix.ENOTSUP)); err != nil {
		t.Errorf("a file system without labels, which has none to get wrong: %v", err)
	}
	if err := labelWhere(selinux, "/dir", setxattr(unix.EACCES)); !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), "/dir") {
		t.Errorf("refused: %v", err)
	}
}
