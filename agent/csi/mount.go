package csi

import (
	"bufio"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// mountPoint is a line of mountinfo (proc_pid_mountinfo(5)).
type mountPoint struct {
	device string // major:minor
	root   string // what of the file system is mounted
	at     string
	shared bool // what is mounted below it is seen by its peers, too
}

// parseMounts reads mountinfo.
func parseMounts(r io.Reader) (all []mountPoint, err error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 7 {
			return nil, errors.New("mountinfo has a line with fewer than seven fields")
		}
		m := mountPoint{device: fields[2], root: unescape(fields[3]), at: unescape(fields[4])}
		for _, optional := range fields[6:] {
			if optional == "-" {
				break
			}
			m.shared = m.shared || strings.HasPrefix(optional, "shared:")
		}
		all = append(all, m)
	}
	return all, lines.Err()
}

// unescape undoes the kernel's octal form of blanks and backslashes.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// over is the mount that path lies in: the last of those with the longest way there.
func over(all []mountPoint, path string) (found mountPoint, ok bool) {
	for _, m := range all {
		if within(m.at, path) && len(m.at) >= len(found.at) {
			found, ok = m, true
		}
	}
	return found, ok
}

// mountPointAt reports whether something is mounted at path.
func mountPointAt(all []mountPoint, path string) bool {
	path = filepath.Join(resolved(filepath.Dir(path)), filepath.Base(path)) // a link in its place is no mount
	return slices.ContainsFunc(all, func(m mountPoint) bool { return m.at == path })
}

// bound is a directory of dir that is mounted somewhere.
type bound struct{ key, at string }

// boundOf finds where directories of dir are mounted below root. dir and root are without symbolic links.
func boundOf(all []mountPoint, dir, root string) (found []bound) {
	home, ok := over(all, dir)
	if !ok {
		return nil
	}
	rest, err := filepath.Rel(home.at, dir)
	if err != nil {
		return nil
	}
	ours := filepath.Join(home.root, rest)
	for _, m := range all {
		of, below := strings.CutPrefix(m.root, ours+"/")
		if m.device == home.device && below && within(root, m.at) {
			key, _, _ := strings.Cut(of, "/")
			found = append(found, bound{key, m.at})
		}
	}
	return found
}

// within reports whether path is root or lies below it.
func within(root, path string) bool {
	return root == "/" || path == root || strings.HasPrefix(path, root+"/")
}
