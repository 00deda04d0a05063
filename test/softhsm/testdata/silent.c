// A PKCS #11 library (OASIS PKCS #11 2.40) that is SoftHSM's, but that its calls do not return while a file exists: the one that
// SILENT_WHILE names. So hangs the library of an HSM whose network is gone. SILENT_LIBRARY is SoftHSM's.
#define CK_PTR *
#define CK_DECLARE_FUNCTION(returns, name) returns name
#define CK_DECLARE_FUNCTION_POINTER(returns, name) returns(*name)
#define CK_CALLBACK_FUNCTION(returns, name) returns(*name)
#ifndef NULL_PTR
#define NULL_PTR 0
#endif
#include <dlfcn.h>
#include <pkcs11.h>
#include <stdlib.h>
#include <unistd.h>

static CK_FUNCTION_LIST_PTR real;
static CK_FUNCTION_LIST list;

static void hang(void) {
	const char *file = getenv("SILENT_WHILE");
	while (file != NULL && access(file, F_OK) == 0) usleep(10000);
}

static CK_RV find(CK_SESSION_HANDLE session, CK_ATTRIBUTE_PTR template, CK_ULONG count) {
	hang();
	return real->C_FindObjectsInit(session, template, count);
}

static CK_RV sign(CK_SESSION_HANDLE session, CK_BYTE_PTR data, CK_ULONG length, CK_BYTE_PTR signature, CK_ULONG_PTR size) {
	hang();
	return real->C_Sign(session, data, length, signature, size);
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR functions) {
	if (real == NULL) {
		const char *path = getenv("SILENT_LIBRARY");
		void *library = path == NULL ? NULL : dlopen(path, RTLD_NOW | RTLD_LOCAL);
		CK_C_GetFunctionList get = library == NULL ? NULL : (CK_C_GetFunctionList)dlsym(library, "C_GetFunctionList");
		if (get == NULL || get(&real) != CKR_OK) return CKR_GENERAL_ERROR;
		list = *real;
		list.C_FindObjectsInit = find;
		list.C_Sign = sign;
	}
	*functions = &list;
	return CKR_OK;
}
