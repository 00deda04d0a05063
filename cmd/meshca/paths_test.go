package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// pathsConfig names one file each under dir, by every key that can name one.
func pathsConfig(dir string) *Config {
	c := &Config{TrustDomain: "mesh.test", StateDir: dir, AdminSocket: dir + "/admin.sock", BundleFile: dir + "/bundle.json",
		Audit: AuditConfig{File: dir + "/audit.log"}, PolicyFile: dir + "/policy.yaml", file: dir + "/config.yaml",
		Upstream: UpstreamConfig{Disk: &DiskConfig{PassphraseFile: dir + "/passphrase", ExtraAnchors: []string{dir + "/old.crt", dir + "/new.crt"}}}}
	c.Clusters = make([]ClusterConfig, 1)
	k := &c.Clusters[0]
	k.Name, k.Mode, k.Issuer = "one", "jwks", "https://one.test"
	k.Kubeconfig, k.Keys.URL, k.Keys.CAFile = dir+"/kubeconfig", "https://one.test/keys", dir+"/ca.pem"
	return c
}

// TestNoOutputIsAnotherFile has each file that meshca writes meet each other file of the configuration.
func TestNoOutputIsAnotherFile(t *testing.T) {
	if err := pathsConfig(t.TempDir()).complete(); err != nil {
		t.Fatalf("a file each: %v", err)
	}
	dir := t.TempDir()
	outputs := map[string]func(*Config, string){
		"bundleFile":             func(c *Config, p string) { c.BundleFile = p },
		"audit.file":             func(c *Config, p string) { c.Audit.File = p },
		"adminSocket":            func(c *Config, p string) { c.AdminSocket = p },
		"upstream.disk.certFile": func(c *Config, p string) { c.Upstream.Disk.CertFile = p },
		"upstream.disk.keyFile":  func(c *Config, p string) { c.Upstream.Disk.KeyFile = p },
	}
	whole := pathsConfig(dir)
	if err := whole.complete(); err != nil {
		t.Fatal(err)
	}
	whole.Clusters[0].Keys.File = dir + "/keys.json"
	files := whole.files()
	if len(files) != 15 {
		t.Fatalf("%d files: say in pathsConfig what the new one is", len(files))
	}
	for output, set := range outputs {
		for _, other := range files {
			if other.key == output {
				continue
			}
			c := pathsConfig(dir)
			if other.key == "clusters[0].jwks.file" {
				c.Clusters[0].Keys.File, c.Clusters[0].Keys.URL, c.Clusters[0].Keys.CAFile = other.path, "", ""
			}
			set(c, other.path)
			err := c.complete()
			if err == nil || !strings.Contains(err.Error(), output) || !strings.Contains(err.Error(), other.key) {
				t.Errorf("%s at the file of %s: %v", output, other.key, err)
			}
		}
	}
}

// TestWhatIsOnlyReadMayBeReadTwice: clusters share kubeconfigs and keys.
func TestWhatIsOnlyReadMayBeReadTwice(t *testing.T) {
	c := pathsConfig(t.TempDir())
	c.Clusters = append(c.Clusters, c.Clusters[0])
	c.Clusters[0].SameNamespaces, c.Clusters[1].SameNamespaces, c.Clusters[1].Name = true, true, "two"
	if err := c.complete(); err != nil {
		t.Error(err)
	}
}

// TestAFileIsKnownByWhereItLies, not by how its path is spelt.
func TestAFileIsKnownByWhereItLies(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	for _, err := range []error{
		os.Mkdir("state", 0o700), os.Symlink("state", "link"), os.Symlink("state/root.key", "to-key"),
		os.Symlink("root.real", "state/linked.key"), os.WriteFile("state/root.real", nil, 0o600), os.WriteFile("state/old.crt", nil, 0o600),
		os.Link("state/old.crt", "hard.crt"), os.Symlink("loop", "loop"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, tt := range map[string]struct {
		edit func(*Config)
		want string
	}{
		"relative and absolute": {func(c *Config) { c.StateDir, c.BundleFile = "state", dir+"/state/root.key" }, "keyFile"},
		"the working directory": {func(c *Config) { c.StateDir, c.BundleFile = ".", dir+"/root.key" }, "keyFile"},
		"a directory's symlink": {func(c *Config) { c.StateDir, c.BundleFile = "state", "link/root.key" }, "keyFile"},
		"below a directory that is not there": {
			func(c *Config) { c.StateDir, c.BundleFile = "state/new", "link/new/root.key" }, "keyFile"},
		"a symlink to what is not there yet": {func(c *Config) { c.StateDir, c.Audit.File = "state", "to-key" }, "keyFile"},
		"what a symlink of the key leads to": {
			func(c *Config) {
				c.StateDir, c.Upstream.Disk.KeyFile, c.BundleFile = "state", "state/linked.key", "state/root.real"
			}, "keyFile"},
		"a hard link": {
			func(c *Config) { c.Upstream.Disk.ExtraAnchors, c.Audit.File = []string{"state/old.crt"}, "hard.crt" }, "extraAnchors[0]"},
		"dots": {func(c *Config) { c.StateDir, c.BundleFile = "state", "link/../state/./root.key" }, "keyFile"},
	} {
		t.Run(name, func(t *testing.T) {
			c := pathsConfig(dir)
			tt.edit(c)
			if err := c.complete(); err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "a file of its own") {
				t.Errorf("got %v, want it to name %s", err, tt.want)
			}
		})
	}
	for _, apart := range []string{"state/bundle.json", "loop", "root.key"} {
		c := pathsConfig(dir)
		c.StateDir, c.BundleFile = "state", apart
		if err := c.complete(); err != nil {
			t.Errorf("a bundle at %s: %v", apart, err)
		}
	}
}

// TestTheConfigurationIsAFileToo: an audit log in it would be the end of the next start.
func TestTheConfigurationIsAFileToo(t *testing.T) {
	file := write(t, "")
	if err := os.WriteFile(file, []byte(soundConfig+"audit: {file: "+file+"}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadConfig(file); err == nil || !strings.Contains(err.Error(), "audit.file") {
		t.Errorf("got %v", err)
	}
}

// TestWhatIsWrittenIsWhatWasChecked: the kernel goes through a symlink before "..", filepath does not.
func TestWhatIsWrittenIsWhatWasChecked(t *testing.T) {
	c := pathsConfig("/state")
	c.BundleFile, c.Audit.File, c.AdminSocket = "/link/../a", "/link/../b", "/link/../c"
	c.Upstream.Disk.CertFile, c.Upstream.Disk.KeyFile = "/link/../d", "/link/../e"
	if err := c.complete(); err != nil {
		t.Fatal(err)
	}
	for got, want := range map[string]string{
		c.BundleFile: "/a", c.Audit.File: "/b", c.AdminSocket: "/c", c.Upstream.Disk.CertFile: "/d", c.Upstream.Disk.KeyFile: "/e",
	} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
