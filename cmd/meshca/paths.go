package main

import (
	"fmt"
	"os"
	"path/filepath"
)

// maxSocketPath is what sockaddr_un holds, without its final zero (unix(7)).
const maxSocketPath = 107

// namedFile is a file of the configuration, by the key that names it.
type namedFile struct {
	key, path string
	// ours says that meshca writes it.
	ours bool
}

// files are all that the configuration names, itself included.
func (c *Config) files() []namedFile {
	all := []namedFile{
		{"stateDir (meshca.db)", filepath.Join(c.StateDir, "meshca.db"), true},
		{"stateDir (meshca.db.wal)", filepath.Join(c.StateDir, "meshca.db.wal"), true},
		{"adminSocket", c.AdminSocket, true},
		{"bundleFile", c.BundleFile, true},
		{"audit.file", c.Audit.File, true},
		{"policyFile", c.PolicyFile, false},
		{"the configuration itself", c.file, false},
	}
	all = append(all, c.Upstream.files()...)
	all = append(all, c.Intermediate.Key.files(c.intermediatesDir())...)
	for i, k := range c.Clusters {
		all = append(all,
			namedFile{fmt.Sprintf("clusters[%d].kubeconfig", i), k.Kubeconfig, false},
			namedFile{fmt.Sprintf("clusters[%d].jwks.file", i), k.Keys.File, false},
			namedFile{fmt.Sprintf("clusters[%d].jwks.caFile", i), k.Keys.CAFile, false})
	}
	return all
}

// checkPaths refuses a socket's path that cannot be, and two uses of one file of which meshca writes one: a bundle
// written over the root key would be the end of the trust domain. What is only read may be read twice.
func (c *Config) checkPaths() error {
	if len(c.AdminSocket) > maxSocketPath {
		return fmt.Errorf("adminSocket: %d bytes are too long for a unix socket's path: at most %d", len(c.AdminSocket), maxSocketPath)
	}
	files := c.files()
	places := make([]place, len(files))
	for i, f := range files {
		if f.path == "" {
			continue
		}
		var err error
		if places[i], err = locate(f.path); err != nil {
			return fmt.Errorf("%s: %w", f.key, err)
		}
		for k := range i {
			if files[k].path != "" && (files[k].ours || f.ours) && places[i].same(places[k]) {
				return fmt.Errorf("%s: %s is the file of %s (%s) already: give each a file of its own", f.key, f.path, files[k].key, files[k].path)
			}
		}
	}
	return nil
}

// place is a file, however its path is spelt.
type place struct {
	path string      // absolute and without symlinks
	info os.FileInfo // nil when there is none yet
}

func locate(path string) (place, error) {
	full, err := filepath.Abs(path)
	if err != nil {
		return place{}, err
	}
	p := place{path: resolve(full, maxLinks)}
	if info, err := os.Stat(path); err == nil {
		p.info = info
	}
	return p, nil
}

// same tells whether two places are one. Paths alone do not tell: there are hard links, bind mounts, and file systems
// that know no case.
func (p place) same(q place) bool {
	return p.path == q.path || p.info != nil && q.info != nil && os.SameFile(p.info, q.info)
}

// maxLinks is how many symlinks to nothing are followed; the kernel follows 40 of any kind (path_resolution(7)).
const maxLinks = 40

// resolve follows the symlinks of an absolute path as far as it exists, and those that lead to what is not there yet.
func resolve(path string, links int) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	dir := filepath.Dir(path)
	if dir == path {
		return path
	}
	dir = resolve(dir, links)
	path = filepath.Join(dir, filepath.Base(path))
	to, err := os.Readlink(path)
	if err != nil || links == 0 {
		return path
	}
	if !filepath.IsAbs(to) {
		to = filepath.Join(dir, to)
	}
	return resolve(to, links-1)
}
