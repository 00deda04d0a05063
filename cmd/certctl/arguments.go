package main

import (
	"fmt"
	"regexp"
	"strings"
)

// maxArgument bounds an argument, in bytes: the longest path of Linux, twice a SPIFFE ID. Who gives more has given a file's
// content where its name belongs.
const maxArgument = 4096

// tokenForm is a JWT wherever it stands: a header, claims, and a signature that may be missing.
var tokenForm = regexp.MustCompile(`eyJ[\w-]{4,}\.[\w-]+\.[\w-]*`)

// unfit refuses arguments that are secrets, before any of them can get into an error, a request or the CA's log. It shows
// none of them, nor one that is longer than all that could be meant. Nil: there is none.
func unfit(args []string) error {
	for i, arg := range args {
		f := &failure{code: exitUsage}
		switch {
		case tokenForm.MatchString(arg):
			f.what, f.why = fmt.Sprintf("argument %d looks like a token", i+1), "it is not shown here, and nothing was done with it"
			f.next = "A token is read from a file: `certctl policy test --token-file FILE`, or `--token-file -` for the standard input"
		case strings.Contains(arg, "PRIVATE KEY-----"):
			f.what, f.why = fmt.Sprintf("argument %d looks like a private key", i+1), "it is not shown here, and nothing was done with it"
			f.next = "Name the file that it is in"
		case len(arg) > maxArgument:
			f.what, f.why = fmt.Sprintf("argument %d has %d bytes", i+1, len(arg)), fmt.Sprintf("at most %d are taken", maxArgument)
			f.next = "If it is what a file holds, name the file"
		default:
			continue
		}
		return f
	}
	return nil
}

// maxShown is how much of what was typed cobra's errors may repeat, in bytes.
const maxShown = 200

// cut shortens a text that may hold anything.
func cut(s string) string {
	if len(s) <= maxShown {
		return s
	}
	return strings.ToValidUTF8(s[:maxShown], "") + "…"
}
