package sds

import (
	"strings"
	"unicode/utf8"
)

// Names as SPIRE has them.
const (
	// NameDefault is the first identity's TLS certificate.
	NameDefault = "default"
	// NameRootCA is the validation context of the own trust domain.
	NameRootCA = "ROOTCA"
	// NameAll is the validation context of all trust domains.
	NameAll = "ALL"
)

// Names as Istio has them (istio.io/istio/pkg/security).
const (
	prefixFile     = "file-"
	prefixFileCert = prefixFile + "cert:"
	prefixFileRoot = prefixFile + "root:"
	fileSeparator  = "~"
	fileSystem     = "system"
)

// DefaultSystemBundle is where `file-root:system` points: the place of Debian's, Ubuntu's, Alpine's and Envoy's images.
const DefaultSystemBundle = "/etc/ssl/certs/ca-certificates.crt"

// nameWildcard subscribes to everything (xDS protocol, "How the client specifies what resources to return").
const nameWildcard = "*"

const (
	// maxPath is Linux's PATH_MAX.
	maxPath = 4096
	// maxName holds the longest name that can mean something: a file-cert with two paths.
	maxName = len(prefixFileCert) + 2*maxPath + len(fileSeparator)
)

// fileName is a parsed `file-` name: the certificate and key, or the roots, that a proxy reads in its own file system.
type fileName struct {
	cert, key string
	root      string
}

// parseFileName reads an Istio `file-` name; ok is false where it is none. A path is taken as it stands: it is opened
// by the peer that named it, never here.
func parseFileName(name, systemBundle string) (f fileName, ok bool) {
	if rest, is := strings.CutPrefix(name, prefixFileCert); is {
		cert, key, two := strings.Cut(rest, fileSeparator)
		return fileName{cert: cert, key: key}, two && isPath(cert) && isPath(key)
	}
	if rest, is := strings.CutPrefix(name, prefixFileRoot); is {
		if rest == fileSystem {
			return fileName{root: systemBundle}, true
		}
		return fileName{root: rest}, isPath(rest)
	}
	return fileName{}, false
}

// isPath reports whether s can be a path in such a name: Istio's separator cannot be part of it.
func isPath(s string) bool {
	return s != "" && len(s) <= maxPath && !strings.Contains(s, fileSeparator) && !strings.ContainsRune(s, 0) && utf8.ValidString(s)
}
