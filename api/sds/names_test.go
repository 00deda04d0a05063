package sds

import (
	"strings"
	"testing"
)

func TestFileNames(t *testing.T) {
	for name, want := range map[string]fileName{
		"file-root:/etc/roots.pem":               {root: "/etc/roots.pem"},
		"file-root:./roots.pem":                  {root: "./roots.pem"},
		"file-root:system":                       {root: "/system.pem"},
		"file-root:a:b":                          {root: "a:b"},
		"file-cert:/c.pem~/k.pem":                {cert: "/c.pem", key: "/k.pem"},
		"file-cert:c~k":                          {cert: "c", key: "k"},
		"file-cert:system~k":                     {cert: "system", key: "k"},
		"file-root:" + strings.Repeat("a", 4096): {root: strings.Repeat("a", 4096)},
	} {
		if got, ok := parseFileName(name, "/system.pem"); !ok || got != want {
			t.Errorf("%.40q: %+v, %v", name, got, ok)
		}
	}
	for _, name := range []string{
		"", "default", "file-root:", "file-root:a~b", "file-cert:", "file-cert:a", "file-cert:~k", "file-cert:c~",
		"file-cert:a~b~c", "file-root:a\x00b", "file-cert:a\x00~b", "File-root:/r", "file-root", "file:/r",
		"file-root:\xff", "file-root:" + strings.Repeat("a", 4097),
	} {
		if got, ok := parseFileName(name, "/system.pem"); ok {
			t.Errorf("%.40q is taken for %+v", name, got)
		}
	}
}

func FuzzFileName(f *testing.F) {
	for _, seed := range []string{"file-root:/r", "file-cert:a~b", "file-root:system", "default", "file-cert:~"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, name string) {
		got, ok := parseFileName(name, "/system.pem")
		if !ok {
			return
		}
		var back string
		switch {
		case got.root != "" && got.cert == "" && got.key == "":
			back = prefixFileRoot + got.root
			if name == prefixFileRoot+fileSystem {
				back = name
			}
		case got.root == "" && got.cert != "" && got.key != "":
			back = prefixFileCert + got.cert + fileSeparator + got.key
		}
		if back != name {
			t.Fatalf("%q is read as %+v", name, got)
		}
		if wire, err := newFile(name, got).encoded(); err != nil || wire.GetName() != name {
			t.Fatalf("%q cannot be encoded: %v", name, err)
		}
	})
}

func FuzzPeerText(f *testing.F) {
	f.Add("Failed to load certificate chain from <inline>")
	f.Add("a\n-----BEGIN PRIVATE KEY-----\nMII")
	f.Fuzz(func(t *testing.T, s string) {
		got := nackDetail(s)
		if len(got) > maxDetail+len("(the rest quotes the secret and is withheld)") || strings.ContainsAny(got, "\n\r\x1b\x00") ||
			strings.Contains(got, "BEGIN") && strings.Contains(got, "-----") || strings.Contains(got, "PRIVATE KEY") {
			t.Fatalf("%q became %q", s, got)
		}
	})
}
